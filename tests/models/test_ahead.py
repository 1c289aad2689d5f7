"""Reading ahead: the same tensors and the same errors, in the order in which blocks are walked."""

from __future__ import annotations

import threading
from collections.abc import Collection
from pathlib import Path

import pytest
import torch
from torch import Tensor

from exlq import memory
from exlq.checkpoint.open import open_checkpoint
from exlq.errors import ModelError
from exlq.memory import Room
from exlq.models.ahead import PAGE_BYTES, ReadAhead, touch
from exlq.models.open import open_model

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Named:
    """Weights that remember which of them were read, and by which thread."""

    def __init__(self, tensors: dict[str, Tensor], broken: Collection[str] = ()) -> None:
        self.tensors, self.broken = tensors, broken
        self.read_by: list[tuple[str, bool]] = []

    def keys(self) -> Collection[str]:
        return self.tensors.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.tensors[key].shape)

    def dtype(self, key: str) -> torch.dtype:
        return self.tensors[key].dtype

    def read(self, key: str, rows: slice | Tensor | None = None) -> Tensor:
        self.read_by.append((key, threading.current_thread() is threading.main_thread()))
        if key in self.broken:
            raise ModelError(f"{key} is broken")
        return self.tensors[key]


def made(**how: Collection[str]) -> Named:
    return Named({name: torch.randn(70, 30).half() for name in "abc"}, **how)


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What was copied into page-locked memory, where there is none."""
    found: list[Tensor] = []

    def pin(tensor: Tensor) -> Tensor:
        found.append(tensor.clone())
        return found[-1]

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    return found


def test_what_was_expected_is_taken_from_page_locked_memory_once(pinned: list[Tensor]) -> None:
    weights = made()
    ahead = ReadAhead(weights, weights, CUDA)
    ahead.expect(["a", "b"])
    for name in "abc":
        assert torch.equal(ahead.take(name), weights.tensors[name])
    assert weights.read_by == [("a", False), ("b", False), ("c", True)]
    assert len(pinned) == 2
    ahead.take("a")
    assert weights.read_by[-1] == ("a", True)


def test_only_one_set_is_held(pinned: list[Tensor]) -> None:
    weights = made()
    ahead = ReadAhead(weights, weights, CUDA)
    ahead.expect(["a"])
    ahead.expect(["b"])
    ahead.take("b")
    ahead.take("a")
    assert weights.read_by == [("a", False), ("b", False), ("a", True)]


def test_on_the_cpu_every_page_is_touched_and_nothing_held(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = made()
    ahead = ReadAhead(weights, weights, CPU)
    ahead.expect(["a"])
    assert ahead.take("a") is weights.tensors["a"]
    assert weights.read_by == [("a", False), ("a", True)]
    seen: list[Tensor] = []
    monkeypatch.setattr(Tensor, "sum", lambda x: seen.append(x))
    touch(torch.arange(5 * PAGE_BYTES // 4).view(5, -1).int())
    assert seen[0].tolist() == [page * PAGE_BYTES // 4 for page in range(5)]


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_a_tensor_that_cannot_be_read_fails_where_it_is_wanted(device: torch.device) -> None:
    weights = made(broken=["b"])
    ahead = ReadAhead(weights, weights, device)
    ahead.expect(["b", "a"])
    assert torch.equal(ahead.take("a"), weights.tensors["a"])
    with pytest.raises(ModelError, match="b is broken"):
        ahead.take("b")


def test_nothing_is_read_ahead_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = made()
    ahead = ReadAhead(weights, weights, CPU)
    needed = 2 * 70 * 30 * 2 * 2
    for free, expected in ((needed - 1, 0), (needed, 2)):
        monkeypatch.setattr(memory, "room", lambda free=free: Room(1 << 40, free))
        ahead.expect(["a", "b"])
        assert torch.equal(ahead.take("c"), weights.tensors["c"])
        assert len([name for name, main in weights.read_by if not main]) == expected


def test_blocks_are_read_ahead_forth_and_back(tiny_llama: Path) -> None:
    checkpoint = open_checkpoint(tiny_llama)
    weights = Named({name: checkpoint.read(name) for name in checkpoint.keys()})  # noqa: SIM118
    model = open_model(tiny_llama, weights, device=CPU)
    for index in (0, 1, 2, 3, 3, 2, 1, 0):
        with model.block(index):
            pass
    with model.block(0):
        pass
    ahead = [int(name.split(".")[2]) for name, main in weights.read_by if not main]
    assert list(dict.fromkeys(ahead[: len(ahead) // 2])) == [1, 2, 3]
    assert list(dict.fromkeys(ahead[len(ahead) // 2 :])) == [2, 1, 0]
