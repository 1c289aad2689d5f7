"""What is said before the work starts holds afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from exlq.pipeline.estimate import estimate, gemm_rate
from exlq.pipeline.outputs import make_outputs
from exlq.pipeline.plan import make_plan
from exlq.sizing import work
from exlq.sizing.effort import EFFORTS, Effort
from exlq.sizing.shapes import read_shape
from exlq.sizing.stored import STORED
from tests.pipeline.conftest import Finished
from tests.pipeline.helpers import settings, stored_bits


def test_the_size_it_announces_is_that_of_the_files(finished: Finished, bundled: Finished) -> None:
    for done in (finished, bundled):
        plan = make_plan(done.config)
        stored = 0
        for path in done.model.glob("*.safetensors"):
            stored += sum(t.numel() * t.element_size() for t in load_file(path).values())
        ((output,), _) = make_outputs(plan)
        assert stored == pytest.approx(output.estimated_bytes(), rel=0.002)
        assert sum(stored_bits(done.model).values()) / 8 < stored


def test_its_estimate_grows_with_the_work(llama: Path, ids_file: Path, tmp_path: Path) -> None:
    plans = [
        make_plan(settings(llama, tmp_path / "out", ids_file, rows=n, measurement_rows=n)) for n in (16, 128)
    ]
    little, much = (estimate(plan, make_outputs(plan)[0]) for plan in plans)
    assert 0 < little.measuring_s * little.gemm_flops < much.measuring_s * much.gemm_flops
    assert list(little.stages_s) == ["gradients", "measuring", "quantizing exl2", "verifying exl2"]
    for stage in little.stages_s:
        assert 0 < little.stages_s[stage] * little.gemm_flops < much.stages_s[stage] * much.gemm_flops
    assert little.total_s == sum(little.stages_s.values())
    assert 0 < little.output_bytes == much.output_bytes < little.disk_bytes <= much.disk_bytes
    assert little.memory_bytes > 0


def test_the_product_rate_is_within_reason() -> None:
    assert 1e8 < gemm_rate(torch.device("cpu")) < 1e14


def test_effort_gives_the_rows_that_are_not_given(
    llama: Path, ids_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(EFFORTS, "best", Effort(quantize_tokens=20 * 8, measure_tokens=12 * 8))
    free = {"rows": None, "measurement_rows": None, "length": 8, "measurement_length": 8, "effort": "best"}
    for given, expected in (({}, (20, 12)), ({"rows": 16}, (16, 12)), ({"measurement_rows": 9}, (20, 9))):
        plan = make_plan(settings(llama, tmp_path / "out", ids_file, **{**free, **given}))
        assert (len(plan.rows.ids), len(plan.measurement_rows.ids)) == expected


def test_shapes_alone_give_the_same_estimate(llama: Path, ids_file: Path, tmp_path: Path) -> None:
    plan = make_plan(settings(llama, tmp_path / "out", ids_file, formats=None, measure=None))
    outputs, _ = make_outputs(plan)
    expected = estimate(plan, outputs)
    shape, formats = read_shape(llama), tuple(output.name for output in outputs)
    heldout = int(plan.rows.heldout.sum()) * plan.rows.ids.shape[1]
    tokens = work.Tokens(plan.rows.ids.numel(), heldout, plan.measurement_rows.ids.numel())
    tries = [sum(STORED[name].tried(spec) for name in formats) for spec in shape.linears]
    found = work.stage_seconds(shape.linears, tries, tokens, work.Todo(formats), expected.gemm_flops)
    assert found == pytest.approx(expected.stages_s)
    assert list(found) == list(expected.stages_s)
    assert work.memory_bytes(shape.linears, shape.hidden_size) == expected.memory_bytes
