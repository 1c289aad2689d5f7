"""The second pass sees what the finished model will see: all earlier linears quantized."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from exlq.errors import HessianError
from exlq.formats.exl2_codec import Exl2Codec
from exlq.models.block import Block
from exlq.numerics import hessian
from exlq.numerics.hessian import HessianSum
from exlq.pipeline import passes
from exlq.pipeline.plan import Plan, make_plan
from exlq.pipeline.progress import silent
from exlq.pipeline.quantize import quantized_linears
from exlq.pipeline.rounding import Rounding
from exlq.types import Option
from exlq.workspace import Workspace
from tests.models.conftest import whole_model
from tests.pipeline.conftest import TinyMaker
from tests.pipeline.helpers import settings

CODEC = Exl2Codec()
FAMILIES = ["llama", "gemma2", "phi3"]
COARSEST, FINEST = 0, -1


@pytest.fixture
def plan_of(tiny: TinyMaker, ids_file: Path, tmp_path: Path) -> Callable[[str], Plan]:
    return lambda family: make_plan(settings(tiny(family, True), tmp_path / "out", ids_file))


def every_linear_at(plan: Plan, index: int) -> Mapping[str, Option]:
    options = {spec.key: CODEC.options(spec)[index] for spec in plan.linears}
    return options | {"lm_head": CODEC.head_option(plan.model.head, 6)}


def factored(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Every Hessian that is factored from here on."""
    seen: list[Tensor] = []
    real = hessian.factor

    def recording(matrix: Tensor, **arguments: Any) -> hessian.Factor:
        seen.append(matrix.clone())
        return real(matrix, **arguments)

    monkeypatch.setattr(hessian, "factor", recording)
    return seen


def quantized(plan: Plan, options: Mapping[str, Option], scratch: Path) -> dict[str, Tensor]:
    """The weight each linear gives back, in the order they came."""
    found = {}
    for spec, tensors in quantized_linears(Rounding(plan, CODEC, options), Workspace(scratch), silent):
        found[spec.key] = CODEC.unpack(tensors, spec, options[spec.key])
    return found


class Substituted:
    """The whole model of transformers, its linears replaced one after another."""

    def __init__(self, plan: Plan) -> None:
        self.model = whole_model(plan.config.in_dir)
        self.rows = plan.quantized_on
        self.linears = {x.spec.key: (i, x) for i in range(2) for x in plan.model.linears(i)}

    def hessian_before(self, key: str) -> Tensor:
        """E[x xᵀ] of a linear's input, float64, in the model as it now stands."""
        found: list[Tensor] = []
        handle = self.module(key).register_forward_pre_hook(lambda _module, args: found.append(args[0]))
        with torch.no_grad():
            self.model(input_ids=self.rows, use_cache=False)
        handle.remove()
        x = found[0].double().flatten(0, 1)
        return x.T @ x / len(x)

    def replace(self, key: str, weight: Tensor) -> None:
        rows = self.linears[key][1].rows if key in self.linears else None
        with torch.no_grad():
            self.module(key).weight[rows or slice(None)] = weight

    def module(self, key: str) -> nn.Linear:
        path = key
        if key in self.linears:
            index, linear = self.linears[key]
            path = f"model.layers.{index}.{linear.module}"
        module = self.model.get_submodule(path)
        assert isinstance(module, nn.Linear)
        return module


def stages_in_order(plan: Plan) -> list[list[str]]:
    """Keys of the linears that share an input, in true sequence, lm_head last; written out by hand."""
    stages = []
    for index in range(2):
        attention, mlp = f"model.layers.{index}.self_attn", f"model.layers.{index}.mlp"
        stages.append([f"{attention}.{name}_proj" for name in "qkv"])
        stages.append([f"{attention}.o_proj"])
        stages.append([f"{mlp}.gate_proj", f"{mlp}.up_proj"])
        stages.append([f"{mlp}.down_proj"])
    return [*stages, ["lm_head"]]


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("at_once", [2048, 130])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_hessian_is_taken_with_all_earlier_linears_quantized(
    plan_of: Callable[[str], Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, at_once: int
) -> None:
    monkeypatch.setattr(passes, "TOKENS_AT_ONCE", at_once)
    plan = plan_of(family)
    seen = factored(monkeypatch)
    weights = quantized(plan, every_linear_at(plan, COARSEST), tmp_path)
    stages = stages_in_order(plan)
    assert list(weights) == [key for stage in stages for key in stage]
    assert len(seen) == len(stages)
    oracle, untouched = Substituted(plan), Substituted(plan)
    for position, (stage, found) in enumerate(zip(stages, seen, strict=True)):
        assert apart(found, oracle.hessian_before(stage[0])) < 1e-4, stage
        moved = apart(found, untouched.hessian_before(stage[0]))
        assert moved > 0.01 if position else moved < 1e-4, "2 bits are felt by all that comes after"
        for key in stage:
            oracle.replace(key, weights[key])


def test_at_high_bits_later_inputs_hardly_differ_from_the_models_own(
    plan_of: Callable[[str], Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of("llama")
    seen = factored(monkeypatch)
    quantized(plan, every_linear_at(plan, FINEST), tmp_path)
    untouched = Substituted(plan)
    for stage, found in zip(stages_in_order(plan), seen, strict=True):
        assert apart(found, untouched.hessian_before(stage[0])) < 0.01


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_quantized_embedding_is_felt_by_the_first_hessian(
    tiny: TinyMaker, ids_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    plan = make_plan(settings(tiny(family, False), tmp_path / "out", ids_file))
    seen, oracle = factored(monkeypatch), Substituted(plan)
    stored = plan.model.linear_weight(plan.model.embedding_key)
    coarse = (stored * 8).round() / 8
    options = every_linear_at(plan, FINEST)
    next(iter(quantized_linears(Rounding(plan, CODEC, options), Workspace(tmp_path), silent, coarse)))
    untouched = oracle.hessian_before("model.layers.0.self_attn.q_proj")
    with torch.no_grad():
        oracle.model.get_input_embeddings().weight.copy_(coarse)
    assert apart(seen[0], oracle.hessian_before("model.layers.0.self_attn.q_proj")) < 1e-4
    assert apart(seen[0], untouched) > 0.001


def test_a_held_out_row_reaches_no_hessian(
    plan_of: Callable[[str], Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of("llama")
    assert int(plan.rows.heldout.sum()) == 3
    counts: list[HessianSum] = []
    real = HessianSum.zeros

    def counted(in_features: int, device: torch.device) -> HessianSum:
        counts.append(real(in_features, device))
        return counts[-1]

    monkeypatch.setattr(HessianSum, "zeros", counted)
    before = quantized(plan, every_linear_at(plan, COARSEST), tmp_path)
    assert [total.n_tokens for total in counts] == [(21 + 5) * 64] * 9, "text and random rows"
    plan.rows.ids[plan.rows.heldout] = 7  # whatever they hold, the outcome is the same
    after = quantized(plan, every_linear_at(plan, COARSEST), tmp_path)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_one_block_at_most_is_in_memory(
    plan_of: Callable[[str], Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of("llama")
    held: list[int] = []
    real = Block.call

    def counting(block: Block, hidden: Tensor) -> Tensor:
        layers = plan.model._skeleton.model.layers
        held.append(sum(any(not p.is_meta for p in layer.parameters()) for layer in layers))
        return real(block, hidden)

    monkeypatch.setattr(Block, "call", counting)
    quantized(plan, every_linear_at(plan, COARSEST), tmp_path)
    assert set(held) == {1}


def test_working_files_go_as_soon_as_they_have_served(plan_of: Callable[[str], Plan], tmp_path: Path) -> None:
    plan = plan_of("llama")
    quantized(plan, every_linear_at(plan, COARSEST), tmp_path)
    assert not (tmp_path / "states.bin").exists()


def test_an_input_that_is_not_finite_is_named(
    plan_of: Callable[[str], Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of("llama")
    real = Block.set_weight

    def overflowing(block: Block, key: str, weight: Tensor) -> None:
        real(block, key, weight * (float("inf") if key == "model.layers.0.mlp.up_proj" else 1))

    monkeypatch.setattr(Block, "set_weight", overflowing)
    with pytest.raises(HessianError, match="block 0, mlp_out: 96 of 96 input channels are not finite"):
        quantized(plan, every_linear_at(plan, COARSEST), tmp_path)
