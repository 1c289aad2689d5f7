"""What is said before the work starts holds afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from exlq.pipeline.estimate import estimate, gemm_rate
from exlq.pipeline.outputs import make_outputs
from exlq.pipeline.plan import make_plan
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
