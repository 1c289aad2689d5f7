"""The staged pass gives each stage what the plain forward gives it, with the stages before it changed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from exlq.models.block import Block
from exlq.models.model import Model
from tests.models.conftest import CASES, TinyMaker, opened


def kept_in_memory(name: str, shape: tuple[int, ...]) -> Tensor:
    return torch.full(shape, float("nan"))


def coarse(weight: Tensor) -> Tensor:
    """A crude stand-in for quantization that is felt."""
    return (weight.float() * 8).round() / 8


def walk(
    block: Block,
    model: Model,
    index: int,
    states: Tensor,
    *,
    keep: Callable[[str, tuple[int, ...]], Tensor] = kept_in_memory,
    batch_rows: int = 2,
) -> tuple[dict[str, Tensor], Tensor]:
    """Every stage's inputs and the outputs, each linear made coarse when its stage has been seen."""
    staged = block.staged(keep, batch_rows=batch_rows)
    inputs = {}
    for stage in block.stages:
        pieces = list(staged.inputs(stage.input_key, states))
        if stage.expert is None:
            assert [rows.stop - rows.start for rows, _ in pieces] == [len(x) for _, x in pieces]
        inputs[stage.input_key] = torch.cat([x for _, x in pieces])
        for linear in model.linears(index):
            if linear.stage == stage.input_key:
                block.set_weight(linear.spec.key, coarse(model.linear_weight(linear.spec.key)))
    out = torch.empty_like(states)
    staged.outputs(states, out)
    return inputs, out


@pytest.mark.parametrize(("family", "tied"), CASES)
def test_a_staged_pass_equals_the_plain_forward_of_the_changed_block(
    tiny: TinyMaker, family: str, tied: bool, rows: Tensor
) -> None:
    model = opened(tiny(family, tied))
    states = model.embed(rows)
    for index in range(model.n_blocks):
        with model.block(index) as block:
            before = block.forward(states)
            inputs, out = walk(block, model, index, states)
            plain: dict[str, Tensor] = {}
            own: dict[str, Tensor] = {}
            wanted = block.forward(states, plain.__setitem__, own.__setitem__)
        assert (out - wanted).abs().max() < 1e-5
        assert (before - wanted).abs().max() > 1e-2
        for key, x in inputs.items():
            if key in plain:
                assert (x - plain[key]).abs().max() < 1e-5, key
        for key, x in own.items():  # an expert's own tokens are among those it is given
            assert (
                float(torch.cdist(x, inputs[key], compute_mode="donot_use_mm_for_euclid_dist").amin(1).max())
                < 1e-3
            ), key
        states = wanted


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2"])
def test_a_staged_pass_computes_every_linear_about_once(tiny: TinyMaker, family: str, rows: Tensor) -> None:
    """gate and up run in their own stage's successor alone, attention in one stage alone."""
    model = opened(tiny(family, True))
    states = model.embed(rows)
    seen: dict[str, int] = {}
    with model.block(0) as block:
        for path in {linear.module for linear in model.linears(0)}:
            module = block.module.get_submodule(path)

            def count(_module: object, _args: object, _out: object, path: str = path) -> None:
                seen[path] = seen.get(path, 0) + 1

            module.register_forward_hook(count)
        walk(block, model, 0, states, batch_rows=len(states))
    assert seen == {linear.module: 1 for linear in model.linears(0)}


def test_outputs_may_overwrite_the_inputs_and_be_stored_short(tiny: TinyMaker, rows: Tensor) -> None:
    model = opened(tiny("gemma2", True))
    states = model.embed(rows)
    with model.block(0) as block:
        _, wanted = walk(block, model, 0, states)
    short = states.bfloat16()
    with model.block(0) as block:
        _, out = walk(block, model, 0, short, keep=lambda _n, shape: torch.zeros(shape, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    assert (out.float() - wanted).norm() / wanted.norm() < 0.02
    with model.block(0) as block:
        staged = block.staged(kept_in_memory)
        for stage in block.stages:
            assert sum(len(x) for _, x in staged.inputs(stage.input_key, states)) == len(states)
        plain = block.forward(states)
        staged.outputs(states, states)
        assert (states - plain).abs().max() < 1e-5


def test_what_is_kept_is_named_and_shaped_per_token(tiny: TinyMaker, rows: Tensor) -> None:
    model = opened(tiny("phi3", True))
    made: dict[str, tuple[int, ...]] = {}

    def keep(name: str, shape: tuple[int, ...]) -> Tensor:
        made[name] = shape
        return torch.empty(shape)

    with model.block(0) as block:
        walk(block, model, 0, model.embed(rows), keep=keep)
    n, length = rows.shape
    assert made == {
        "attn_out": (n, length, 64),
        "attn_out_output": (n, length, 64),
        "mlp_out": (n, length, 96),
    }


def test_stages_out_of_order_are_a_bug(tiny: TinyMaker, rows: Tensor) -> None:
    model = opened(tiny("llama", True))
    states = model.embed(rows)
    with model.block(0) as block:
        staged = block.staged(kept_in_memory)
        with pytest.raises(AssertionError, match="attn_in"):
            next(staged.inputs("mlp_in", states))
        with pytest.raises(AssertionError, match="were walked"):
            staged.outputs(states, states)


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
def test_the_residual_stream_is_what_attention_and_mlp_are_added_to(
    tiny: TinyMaker, family: str, rows: Tensor
) -> None:
    """Held against the block's own: its input, and what its second norm receives."""
    model = opened(tiny(family, True))
    states = model.embed(rows)
    with model.block(0) as block:
        seen: list[Tensor] = []
        norm = block.module.post_attention_layernorm
        handle = norm.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
        block.forward(states)
        handle.remove()
        staged = block.staged(kept_in_memory, batch_rows=2)
        found: dict[str, list[Tensor]] = {}
        for stage in block.stages:
            for part, _ in staged.inputs(stage.input_key, states):
                if staged.closes(stage.input_key):
                    found.setdefault(stage.input_key, []).append(staged.residual(states, part))
    assert list(found) == ["attn_out", "mlp_out"]
    assert torch.equal(torch.cat(found["attn_out"]), states)
    assert (torch.cat(found["mlp_out"]) - seen[0]).abs().max() < 1e-5


def test_a_twin_has_a_block_of_its_own(tiny: TinyMaker, rows: Tensor) -> None:
    llama_model = opened(tiny("llama", True))
    twin = llama_model.twin()
    states = llama_model.embed(rows)
    with llama_model.block(0) as block, twin.block(0) as other:
        for linear in llama_model.linears(0):
            block.set_weight(linear.spec.key, torch.zeros_like(llama_model.linear_weight(linear.spec.key)))
        changed, untouched = block.forward(states), other.forward(states)
    with llama_model.block(0) as block:
        assert torch.equal(untouched, block.forward(states))
    assert not torch.equal(changed, untouched)


@pytest.mark.parametrize("family", ["llama", "phi3", "mixtral"])
def test_a_pass_that_frees_weights_computes_the_same_and_holds_less(
    tiny: TinyMaker, family: str, rows: Tensor
) -> None:
    model = opened(tiny(family, False))
    states = model.embed(rows)
    with model.block(0) as block:
        wanted = block.forward(states)
        staged = block.staged(lambda _, shape: torch.empty(shape), frees=True)
        for stage in block.stages:
            staged.skip(stage.input_key, states)
        out = torch.empty_like(states)
        staged.outputs(states, out)
        gone = {name for name, value in block.module.named_parameters() if value.is_meta}
    assert (out - wanted).abs().max() < 1e-5
    assert any(name.startswith("self_attn.q") for name in gone)
    assert not any("o_proj" in name or "down_proj" in name or "norm" in name for name in gone)
