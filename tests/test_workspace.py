"""Tensors in files: what was written is there again when the file is mapped again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from exlq.workspace import Workspace


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_a_tensor_written_and_dropped_is_there_when_mapped_again(tmp_path: Path, dtype: torch.dtype) -> None:
    wanted = torch.arange(3 * 5 * 7).reshape(3, 5, 7).to(dtype)
    made = Workspace(tmp_path).tensor("states", (3, 5, 7), dtype)
    made.copy_(wanted)
    del made
    again = Workspace(tmp_path).tensor("states", (3, 5, 7), dtype)
    assert again.dtype == dtype
    assert torch.equal(again, wanted)
    assert [path.stat().st_size for path in tmp_path.iterdir()] == [wanted.nbytes]


def test_a_part_written_through_one_view_is_seen_through_another(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    one, other = workspace.tensor("x", (4, 6)), workspace.tensor("x", (4, 6))
    one[2, 1:3] = 7
    assert other[2].tolist() == [0, 7, 7, 0, 0, 0]


def test_names_are_apart_and_float32_unless_said(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    workspace.tensor("a", (8,)).fill_(1)
    workspace.tensor("b", (8,)).fill_(2)
    assert workspace.tensor("a", (8,)).tolist() == [1.0] * 8
    assert workspace.tensor("a", (8,)).dtype == torch.float32


def test_a_removed_tensor_leaves_nothing_and_starts_anew(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    workspace.tensor("a", (8,)).fill_(1)
    workspace.tensor("b", (8,)).fill_(2)
    workspace.remove("a")
    workspace.remove("never made")
    assert [path.name for path in tmp_path.iterdir()] == ["b.bin"]
    assert workspace.tensor("a", (8,)).tolist() == [0.0] * 8
