"""GGUF by the names llama-quantize knows: their types, without measuring, with and without feedback."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from exlq.evaluation import llamacpp
from exlq.formats.gguf.overrides import read_type_file
from exlq.formats.gguf.recipes import Shape, recipe_named, recipe_types
from exlq.models.model import Model
from exlq.pipeline import verify
from exlq.pipeline.config import ConvertConfig
from tests.models.conftest import whole_logits
from tests.pipeline.conftest import Finished
from tests.pipeline.helpers import Events, Stored, block_is_read, convert


@pytest.fixture(scope="module")
def stored(both: Finished) -> Stored:
    return Stored.read(both.gguf)


@pytest.fixture
def again(both: Finished, tmp_path: Path) -> ConvertConfig:
    """The GGUF part of the finished conversion elsewhere, its measurement given."""
    return replace(both.config, out_dir=tmp_path / "out", measurement=both.measurement, formats=("gguf",))


def by_recipe(config: ConvertConfig, name: str, **changes: Any) -> ConvertConfig:
    return replace(config, bits=None, measurement=None, gguf_type=name, **changes)


def test_the_types_beside_the_file_reproduce_it_here(both: Finished, again: ConvertConfig) -> None:
    items = tuple(read_type_file(both.gguf / "Wide-1.0M-4.50bpw.types.txt"))
    summary = convert(replace(again, bits=None, gguf_type="Q2_K", tensor_types=items))
    assert summary["outputs"]["gguf"]["types"] == both.summary["outputs"]["gguf"]["types"]
    ours, theirs = Stored.read(again.out_dir / "gguf"), Stored.read(both.gguf)
    for name, tensor in theirs.tensors.items():
        assert ours.tensors[name].data.tobytes() == tensor.data.tobytes(), name


class Named(NamedTuple):
    name: str
    shape: tuple[int, ...]


def recipe_of(stored: Stored, name: str) -> dict[str, str]:
    """What llama-quantize with an importance matrix gives these tensors."""
    tensors = [Named(t.name, tuple(int(n) for n in reversed(t.shape))) for t in stored.tensors.values()]
    return recipe_types(recipe_named(name), tensors, Shape("llama", 2, 4, 2), imatrix=True)


def test_a_recipe_gives_llama_quantizes_types_without_measuring(again: ConvertConfig, stored: Stored) -> None:
    events = Events()
    config = by_recipe(again, "Q4_K_M")
    summary = convert(config, events)
    made = summary["outputs"]["gguf"]
    assert made["types"] == recipe_of(stored, "Q4_K_M") == Stored.read(again.out_dir / "gguf").types
    assert "measuring" not in events.stages
    assert (made["predicted_kl"], made["optimality_gap"], summary["measurement"]) == (None, None, None)
    assert made["file_bytes"] == made["bytes"]
    assert (again.out_dir / "gguf" / "Wide-1.0M-Q4_K_M.gguf").is_file()
    assert not (again.out_dir / "measurement.json").exists()


def test_a_recipe_with_a_measurement_tells_what_that_predicts(again: ConvertConfig) -> None:
    summary = convert(replace(again, bits=None, gguf_type="Q4_K_M"))
    made = summary["outputs"]["gguf"]
    assert made["predicted_kl"] / 3 < made["evaluation"]["kl_mean"] < made["predicted_kl"] * 3
    assert made["file_bytes"] == made["bytes"]


def entered(monkeypatch: pytest.MonkeyPatch) -> None:
    """No block may be read but for the check of the finished model."""
    real_check, real_block = verify.verify_model, Model.block

    def check(*arguments: Any) -> Any:
        monkeypatch.setattr(Model, "block", real_block)
        return real_check(*arguments)

    monkeypatch.setattr(Model, "block", block_is_read)
    monkeypatch.setattr(verify, "verify_model", check)


@pytest.mark.parametrize(("name", "kl"), [("F32", 1e-9), ("F16", 1e-5), ("BF16", 1e-3)])
def test_floats_need_no_pass_over_the_text(
    again: ConvertConfig, monkeypatch: pytest.MonkeyPatch, name: str, kl: float
) -> None:
    entered(monkeypatch)
    made = convert(by_recipe(again, name))["outputs"]["gguf"]
    assert {made["types"][key] for key in made["types"] if "norm" not in key} == {name}
    assert abs(made["evaluation"]["kl_mean"]) < kl
    assert "exlq.predicted_kl" not in Stored.read(again.out_dir / "gguf").fields


def test_unweighted_rounding_needs_no_pass_over_the_text_and_names_no_calibration(
    again: ConvertConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered(monkeypatch)
    made = convert(by_recipe(again, "Q4_K_M", gptq=False, weighted=False))["outputs"]["gguf"]
    fields = Stored.read(again.out_dir / "gguf").fields
    assert fields["exlq.rounding"] == "unweighted"
    assert not [key for key in fields if key.startswith("exlq.calibration")]
    assert made["evaluation"]["kl_mean"] < 0.2


def test_llama_cpp_gives_the_bases_logits_from_a_float32_file(again: ConvertConfig) -> None:
    if not llamacpp.available():
        pytest.skip("llama.cpp is not installed (exlq[eval])")
    convert(by_recipe(again, "F32"))
    rows = torch.randint(4, 260, (2, 48), generator=torch.Generator().manual_seed(3))
    (path,) = (again.out_dir / "gguf").glob("*.gguf")
    with llamacpp.Runtime(path) as runtime:
        found = torch.stack([runtime.logits(row) for row in rows])
    wanted = whole_logits(again.in_dir, rows)
    assert (found - wanted).square().mean().sqrt() < 1e-4 * wanted.std()


@pytest.mark.parametrize(("gptq", "nearest"), [(False, True), (True, False)])
def test_without_gptq_every_weight_takes_the_nearest_value_of_its_block(
    again: ConvertConfig, gptq: bool, nearest: bool
) -> None:
    """Half a step is what it is off by then, but for a few that are clipped; feedback moves many further."""
    convert(by_recipe(again, "Q8_0", gptq=gptq))
    stored = Stored.read(again.out_dir / "gguf")
    weights = load_file(again.in_dir / "model.safetensors")
    for name, key in (("blk.1.ffn_down", "model.layers.1.mlp.down_proj"), ("output", "lm_head")):
        data = torch.from_numpy(stored.tensors[f"{name}.weight"].data.copy())
        blocks = torch.unflatten(data, 1, (-1, 34))
        steps = blocks[..., :2].contiguous().view(torch.float16).float().repeat_interleave(32, 1).squeeze(-1)
        off = (stored.values(f"{name}.weight") - weights[f"{key}.weight"]).abs()
        share = (off <= 0.501 * steps.abs()).double().mean()
        assert share > 0.998 if nearest else share < 0.9, name


def test_gptq_beats_plain_rounding_of_the_same_types(again: ConvertConfig) -> None:
    config = by_recipe(again, "Q3_K_M")
    swept = convert(config)["outputs"]["gguf"]
    tensors = Stored.read(again.out_dir / "gguf").tensors
    plain = convert(replace(config, gptq=False))["outputs"]["gguf"]
    others = Stored.read(again.out_dir / "gguf").tensors
    assert plain["types"] == swept["types"]
    same = {name for name in tensors if tensors[name].data.tobytes() == others[name].data.tobytes()}
    assert same == {name for name, kind in swept["types"].items() if kind == "F32"}
    assert swept["evaluation"]["kl_mean"] < 0.9 * plain["evaluation"]["kl_mean"]
