"""The comparison of GPU and CPU: what can be tried without a GPU."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from scripts.check_cuda import Run, alike, table
from tests.conftest import REPOSITORY

NEAR = Run("cpu", {"measuring": 4.0, "all": 9.5}, {"exl2": 0.0123}, {".safetensors": b"abcd"})
FAR = Run("cuda", {"measuring": 1.0, "all": 2.5}, {"exl2": 0.0125}, {".safetensors": b"abxd"})


def test_times_divergence_and_equal_bytes_stand_side_by_side() -> None:
    lines = table([NEAR, FAR])
    assert lines[0] == "| | cpu | cuda |"
    assert "| measuring, s | 4.0 | 1.0 |" in lines
    assert "| KL of exl2 | 0.01230 | 0.01250 |" in lines
    assert "| equal bytes, .safetensors | 100.00% | 75.00% |" in lines


def test_files_of_unlike_lengths_have_nothing_in_common() -> None:
    assert alike(NEAR, Run("x", {}, {}, {".safetensors": b"abc"})) == {".safetensors": 0.0}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here, on which it would take minutes")
def test_without_a_gpu_it_says_so_in_a_line() -> None:
    command = [sys.executable, "scripts/check_cuda.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.splitlines() == [f"torch {torch.__version__} sees no GPU: nothing was checked"]
