"""The peak is of this process's own memory, and only of what was held meanwhile."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from exlq.memory import INTERVAL_S, PeakMemory, anonymous_bytes

MIB = 1 << 20

needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell")


@needs_proc
def test_what_is_held_for_a_while_is_counted_and_what_was_before_is_not() -> None:
    before = torch.ones(64 * MIB, dtype=torch.uint8)
    with PeakMemory() as memory:
        held = torch.ones(256 * MIB, dtype=torch.uint8)
        time.sleep(10 * INTERVAL_S)
        del held
        time.sleep(2 * INTERVAL_S)
    assert 200 * MIB < memory.bytes - memory.before < 300 * MIB
    assert memory.before > len(before)


@needs_proc
def test_a_mapped_file_is_not_counted(tmp_path: Path) -> None:
    before = anonymous_bytes()
    mapped = torch.from_file(str(tmp_path / "a.bin"), shared=True, size=128 * MIB, dtype=torch.uint8)
    mapped.fill_(1)
    assert anonymous_bytes() - before < 32 * MIB
