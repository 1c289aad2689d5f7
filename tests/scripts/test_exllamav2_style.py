"""The opponent of the benchmark against what the reference's own kernels made of the same matrices."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from exlq.checkpoint.open import open_checkpoint
from exlq.formats import exl2
from exlq.formats.exl2_directory import Exl2Weights
from exlq.formats.exl2_options import groups_of
from exlq.models.open import open_model
from exlq.numerics.hessian import energies
from exlq.pipeline.plan import Plan, make_plan
from exlq.types import Option
from exlq.workspace import Workspace
from scripts import annealer, exllamav2_options, exllamav2_rounding, exllamav2_style
from scripts.exllamav2_measure import Way
from tests.conftest import TinyMaker
from tests.pipeline.helpers import settings, write_ids

Measured = tuple[Plan, list[list[Way]]]

WRITTEN = ["30_gptq_b4_g32_128x64", "31_gptq_mlpdown_632_256x96", "33_gptq_b5b4_bias_192x64"]
DISTINCT = {"q_proj": 14, "k_proj": 14, "v_proj": 15, "o_proj": 14}  # of the reference's documents
DISTINCT |= {"gate_proj": 13, "up_proj": 13, "down_proj": 14}


def read(shared: Path, name: str) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    with safe_open(shared / "vectors" / "exl2" / f"{name}.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


@pytest.mark.parametrize("name", WRITTEN)
def test_its_rounding_errs_as_the_references_does(shared: Path, name: str) -> None:
    vector, said = read(shared, name)
    weight, hessian = vector["weight_fp16_out_in"], vector["hessian_sum"] / vector["num_batches"]
    groups = groups_of(exllamav2_options.option(said["desc"].removesuffix(" s4")).qparams, weight.shape[1])
    rounded = exllamav2_rounding.quantize(weight, exllamav2_rounding.inverse(hessian), groups)
    stored = exl2.dequantize_linear(rounded.tensors(groups))[: len(weight)]
    assert torch.equal(stored.float(), rounded.weight())
    error = energies((weight.float() - stored.float()).T, hessian).sum()
    relative = float((error / energies(weight.float().T, hessian).sum()).sqrt())
    assert relative == pytest.approx(float(said["rel_fro_err"]), rel=5e-3)
    same = (rounded.levels == vector["qweight_levels_packed_order"]).float().mean()
    print(f"{name}: {relative:.5f} here, {float(said['rel_fro_err']):.5f} there; {same:.2%} levels alike")
    assert same > 0.99
    assert torch.equal(rounded.codes + 1, vector["qscale_1_to_16"].long())


@pytest.mark.parametrize("name", WRITTEN)
def test_an_options_description_is_read_as_the_reference_does(shared: Path, name: str) -> None:
    _, said = read(shared, name)
    read_here = exllamav2_options.option(said["desc"].removesuffix(" s4"))
    assert read_here.desc == said["desc"]
    assert json.loads(json.dumps(read_here.qparams)) == json.loads(said["qparams"])


def test_the_tables_have_as_many_distinct_settings_as_the_reference_rounds_each_linear_by() -> None:
    found = {
        name: len({way[name].desc for way in ways})
        for ways in exllamav2_options.MODULES.values()
        for name in ways[0]
    }
    assert found == DISTINCT
    assert [len(ways) for ways in exllamav2_options.MODULES.values()] == [19, 17]


def test_the_tables_come_to_the_references_bits() -> None:
    """Of four matrices of 4096 x 4096, and of the MLP's settings those the vectors are made with."""
    attention = exllamav2_options.MODULES["self_attn"]
    for way, bits in ((attention[0], 143142912), (attention[18], 8.039 * 4 * 4096**2)):
        groups = [groups_of(option.qparams, 4096) for option in way.values()]
        assert sum(exl2.storage_bits(each, 4096) for each in groups) == pytest.approx(bits, rel=1e-4)
    down = [way["down_proj"].desc for way in exllamav2_options.MODULES["mlp"]]
    assert down[:2] == ["0.05:6b_32g/0.2:3b_64g/0.75:2b_64g s4"] * 2


def test_a_group_of_zeros_gives_zeros_back() -> None:
    weight = torch.zeros(32, 64)
    weight[:, 40] = 1.0
    groups = groups_of(exllamav2_options.option("1:4b_32g").qparams, 64)
    rounded = exllamav2_rounding.quantize(weight, exllamav2_rounding.inverse(torch.eye(64)), groups)
    assert rounded.weight().isfinite().all()
    assert not rounded.weight()[:, 8:32].any()


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def measured(
    request: pytest.FixtureRequest, tiny: TinyMaker, tmp_path_factory: pytest.TempPathFactory
) -> Measured:
    """A random tiny model and its modules' ways."""
    scratch = tmp_path_factory.mktemp("measured")
    calibration = write_ids(scratch / "ids.parquet")
    plan = make_plan(settings(tiny(request.param, False), scratch / "out", calibration))
    return plan, exllamav2_style.measure(plan, Workspace(scratch))


def behind_modules(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The residual stream behind the first block's attention and behind its MLP, by transformers."""
    seen: list[Tensor] = []
    layer = model.model.layers[0]
    names: dict[str, Any] = dict(layer.named_children())
    norm = names.get("pre_feedforward_layernorm", names["post_attention_layernorm"])
    handles = [norm.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))]
    handles += [model.model.layers[1].register_forward_pre_hook(lambda _module, args: seen.append(args[0]))]
    with torch.no_grad():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return seen[0], seen[1]


def keep_first(inputs: dict[str, Tensor], key: str, _module: Any, args: tuple[Tensor]) -> None:
    inputs.setdefault(key, args[0].detach())


def restored(plan: Plan, key: str, option: Option, inputs: Tensor) -> Tensor:
    """A linear of the unquantized model rounded on the whole inputs, (rows, length, in_features)."""
    tokens = inputs.flatten(0, 1)
    factor = exllamav2_rounding.inverse(tokens.T @ tokens / len(inputs))
    groups = groups_of(option.qparams, inputs.shape[-1])
    return exllamav2_rounding.quantize(plan.model.linear_weight(key), factor, groups).weight()


def test_a_ways_error_is_that_of_the_residual_stream_in_transformers(measured: Measured) -> None:
    plan, modules = measured
    way = 9
    ids = plan.measurement_rows.ids[~plan.measurement_rows.heldout]
    for place, ways in enumerate(modules[:2]):
        model = AutoModelForCausalLM.from_pretrained(plan.config.in_dir, dtype=torch.float32)
        linears = {key: model.get_submodule(key) for key in ways[way].options}
        inputs: dict[str, Tensor] = {}
        for key, linear in linears.items():
            linear.register_forward_pre_hook(partial(keep_first, inputs, key))
        wanted = behind_modules(model, ids)[place]
        for key, option in ways[way].options.items():
            linears[key].weight.data = restored(plan, key, option, inputs[key])
        found = behind_modules(model, ids)[place]
        relative = (found - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)
        assert ways[way].error == pytest.approx(float(relative.mean()), rel=0.02)


def test_the_model_written_has_the_options_chosen_within_the_budget(
    measured: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(annealer, "RUNS", 2)
    plan, modules = measured
    budget = int(5 * plan.numel)
    chosen = exllamav2_style.allocate(modules, budget)
    assert sum(way.bits for way in chosen) <= budget
    exllamav2_style.convert(plan, chosen, tmp_path, Workspace(tmp_path))
    weights = Exl2Weights(tmp_path)
    open_model(tmp_path, weights, device=torch.device("cpu"))
    options = {key: option for way in chosen for key, option in way.options.items()}
    assert set(weights.linears) == {*options, "lm_head"}
    for key, option in (options | {"lm_head": exllamav2_options.HEAD}).items():
        stored = exl2.stored_groups(weights.tensors(key))
        assert stored == groups_of(option.qparams, stored[-1].stop)
        source = open_checkpoint(plan.config.in_dir).read(f"{key}.weight").float()
        error = (weights.read(f"{key}.weight").float() - source).norm() / source.norm()
        assert error < 0.5, f"{key}: {error:.3f} by {option.desc}"
