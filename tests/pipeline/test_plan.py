"""What a plan takes for granted, works out and keeps apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from exlq.errors import ModelError, TargetError
from exlq.formats.exl2_codec import Exl2Codec
from exlq.formats.exl2_options import OPTIONS
from exlq.models.model import Model
from exlq.pipeline.config import ConvertConfig
from exlq.pipeline.outputs import make_outputs
from exlq.pipeline.plan import Plan, make_plan
from tests.helpers import make_model
from tests.pipeline.helpers import block_is_read, settings, write_ids


def stream_of(path: Path) -> torch.Tensor:
    return torch.tensor([i for row in pq.read_table(path)["input_ids"].to_pylist() for i in row])


def places(stream: torch.Tensor, row: torch.Tensor) -> set[int]:
    """Where in the stream a row was cut, found by its content; its first token may be BOS."""
    body = row[1:]
    windows = stream[1:].unfold(0, len(body), 1)
    starts = (windows == body).all(1).nonzero().flatten().tolist()
    return {position for start in starts for position in range(start, start + len(row))}


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": 24, "length": 64, "measurement_rows": 24, "measurement_length": 64},
        {"rows": 40, "length": 48, "measurement_rows": 16, "measurement_length": 64},
        {"rows": 40, "length": 48, "measurement_rows": 16, "measurement_length": 64, "seed": 7},
        {"rows": 64, "length": 64, "measurement_rows": 9, "measurement_length": 128, "seed": 1},
        {"rows": 100, "length": 32, "measurement_rows": 30, "measurement_length": 50, "row_mode": "first"},
    ],
)
def test_what_is_checked_was_in_no_window_a_hessian_saw(
    llama: Path, ids_file: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    plan = make_plan(settings(llama, tmp_path / "out", ids_file, **changes))
    stream = stream_of(ids_file)
    calibration = (
        plan.rows.ids[~plan.rows.heldout],
        plan.measurement_rows.ids[~plan.measurement_rows.heldout],
    )
    seen = {place for rows in calibration for row in rows for place in places(stream, row)}
    checked, _ = plan.checked_rows()
    assert len(checked)
    for row in checked:
        mine = places(stream, row)
        assert len(mine) == len(row)
        assert not mine & seen


def test_equal_settings_give_both_passes_the_same_rows(llama: Path, ids_file: Path, tmp_path: Path) -> None:
    plan = make_plan(settings(llama, tmp_path / "out", ids_file))
    assert torch.equal(plan.rows.ids, plan.measurement_rows.ids)
    assert torch.equal(plan.checked_rows()[0], plan.rows.ids[plan.rows.heldout])


def test_rows_and_lengths_default_to_what_the_model_takes(
    llama: Path, ids_file: Path, tmp_path: Path
) -> None:
    plan = make_plan(ConvertConfig(llama, tmp_path / "out", ids_file, bits=5.0))
    assert plan.rows.ids.shape == plan.measurement_rows.ids.shape == (16384 // 128, 128)
    assert plan.rows.record.notes == ("128 of 1600 rows: the file holds 16384 tokens, 204800 wanted",)


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Model, "block", block_is_read)


@pytest.mark.usefixtures("untouched")
def test_the_range_it_names_is_the_range_there_is(llama: Path, ids_file: Path, tmp_path: Path) -> None:
    config = settings(llama, tmp_path / "out", ids_file)
    plan = make_plan(config)
    codec = Exl2Codec()
    sizes = [[codec.storage_bits(spec, option) for option in OPTIONS] for spec in plan.linears]
    smallest, largest = (sum(map(of, sizes)) / plan.numel for of in (min, max))
    ((output,), _) = make_outputs(make_plan(replace(config, bits=smallest)))
    assert output.reach == f"{smallest:.3f} to {largest:.3f} bits per weight"
    with pytest.raises(TargetError, match=f"{smallest:.4f} to {largest:.4f} bits per weight"):
        make_outputs(make_plan(replace(config, bits=smallest - 1e-6)))


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("name", ["rows", "measurement_rows"])
def test_a_token_the_model_does_not_have_is_found_in_either_passes_rows(tmp_path: Path, name: str) -> None:
    small = make_model("llama", tmp_path / "model", tied=False, vocab_size=250)
    text = write_ids(tmp_path / "ids.parquet", rare=(10000, 255), high=250)
    few: dict[str, Any] = {"rows": 8, "measurement_rows": 8, "row_mode": "first"}
    make_plan(settings(small, tmp_path / "out", text, **few))
    with pytest.raises(ModelError, match="the tokenizer gives token 255, the model has 250"):
        make_plan(settings(small, tmp_path / "out", text, **{**few, name: 200}))


def test_the_origin_names_what_a_measurement_depends_on(llama: Path, ids_file: Path, tmp_path: Path) -> None:
    plan: Plan = make_plan(settings(llama, tmp_path / "out", ids_file, seed=3, states="bf16"))
    assert plan.origin["model"]["architecture"] == "LlamaForCausalLM"
    assert plan.origin["model"]["sha256"].keys() == {"config.json", "model.safetensors"}
    assert len(plan.origin["model"]["tokenizer_sha256"]) == 64
    assert plan.origin["settings"] == {"states": "bf16", "seed": 3, "rounding": "gptq"}
    calibration = plan.origin["calibration"]
    assert (calibration["file"], calibration["rows"], calibration["row_length"]) == ("ids.parquet", 24, 64)
    assert calibration["seed"] == 3
