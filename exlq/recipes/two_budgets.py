"""A GGUF file split between a GPU and the CPU, each with its own bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from exlq.allocation import reachable_range, solve
from exlq.errors import ConfigError, TargetError
from exlq.measurement import LinearRecord, OptionRecord
from exlq.models.layout import EMBEDDING_KEY, HEAD_KEY
from exlq.recipes.room import Room
from exlq.recipes.sheet import block_of
from exlq.recipes.targets import Answer, Split, answer, items, least_loss

FLAG = "--gpu-bytes"


@dataclass(frozen=True)
class Budgets:
    """Bytes for weights on either side; `n_gpu_layers` None: the number that serves best.

    Raises:
        ConfigError: when made, for a number of layers below 0.
    """

    gpu_bytes: int
    cpu_bytes: int
    n_gpu_layers: int | None = None

    def __post_init__(self) -> None:
        if self.n_gpu_layers is not None and self.n_gpu_layers < 0:
            raise ConfigError(f"--n-gpu-layers {self.n_gpu_layers}: 0 or more is wanted")

    @property
    def target(self) -> dict[str, float]:
        """The budgets by their flags."""
        given = {FLAG: self.gpu_bytes, "--cpu-bytes": self.cpu_bytes, "--n-gpu-layers": self.n_gpu_layers}
        return {flag: value for flag, value in given.items() if value is not None}


class _Side(NamedTuple):
    """What is on one side: the matrices, and the bits they may have in all."""

    linears: tuple[LinearRecord, ...]
    budget_bits: int

    @property
    def reached(self) -> bool:
        if not self.linears:
            return self.budget_bits >= 0
        return reachable_range(items(self.linears))[0] <= self.budget_bits

    @property
    def bound(self) -> float:
        """No choice within the budget loses less."""
        if not self.linears:
            return 0.0
        return solve(items(self.linears), self.budget_bits, "lagrange").bound


class _Halves(NamedTuple):
    n_gpu_layers: int
    gpu: _Side
    cpu: _Side

    @property
    def bound(self) -> float:
        return self.gpu.bound + self.cpu.bound


def within_budgets(room: Room, budgets: Budgets) -> Answer:
    """The least loss with the last N blocks on the GPU, over every N or the one given.

    llama.cpp counts the head as the layer after the last block. What is beside the matrices, and the
    embedding, are the CPU's; where the embedding is the head too, the GPU holds it as well from that layer
    on. Of answers that lose the same the one with more layers on the GPU is taken.

    Raises:
        TargetError: if no N fits both.
        MeasurementError: if the record does not tell what is in a file beside its matrices.
    """
    beside = room.sheet.require_bytes(FLAG)
    n_blocks = 1 + max(block_of(linear.key) or 0 for linear in room.sheet.decoder)
    wanted = budgets.n_gpu_layers
    layers = range(n_blocks + 2) if wanted is None else [min(wanted, n_blocks + 1)]
    possible = [_halves(room, budgets, n, n_blocks, beside) for n in layers]
    open_ones = [halves for halves in possible if halves.gpu.reached and halves.cpu.reached]
    if not open_ones:
        raise TargetError(_unreached(room, budgets, beside))
    best: tuple[float, int, Answer] | None = None
    for bound, halves in sorted(((h.bound, h) for h in open_ones), key=lambda pair: pair[0]):
        if best is not None and bound > best[0]:
            break
        found = _solved(room, budgets, halves, n_blocks, beside)
        rank = (room.sheet.loss(found.options), -halves.n_gpu_layers)
        if best is None or rank < best[:2]:
            best = (*rank, found)
    assert best is not None
    return best[2]


def _halves(room: Room, budgets: Budgets, n: int, n_blocks: int, beside: int) -> _Halves:
    """The matrices of both sides, settled ones with their one option among them."""
    gpu: list[LinearRecord] = []
    cpu: list[LinearRecord] = []
    for linear in room.settled.linears:
        (gpu if _on_gpu(linear.key, n, n_blocks) else cpu).append(linear)
    cpu_bits = 8 * (budgets.cpu_bytes - beside)
    if _doubles(room, n, n_blocks):
        embedding = room.settled.by_key[EMBEDDING_KEY]
        fitting = tuple(option for option in embedding.options if option.total_bits <= cpu_bits)
        if fitting:
            gpu, cpu = [*gpu, replace(embedding, options=fitting)], []
    return _Halves(n, _Side(tuple(gpu), 8 * budgets.gpu_bytes), _Side(tuple(cpu), cpu_bits))


def _solved(room: Room, budgets: Budgets, halves: _Halves, n_blocks: int, beside: int) -> Answer:
    options: Mapping[str, OptionRecord] = {
        **least_loss(halves.gpu.linears, halves.gpu.budget_bits),
        **least_loss(halves.cpu.linears, halves.cpu.budget_bits),
    }
    n = halves.n_gpu_layers
    gpu = sum(options[linear.key].total_bits for linear in halves.gpu.linears) // 8
    total = sum(option.total_bits for option in options.values()) // 8
    doubled = options[EMBEDDING_KEY].total_bits // 8 if _doubles(room, n, n_blocks) else 0
    found = answer(room, budgets.target, options)
    return replace(found, split=Split(n, gpu, beside + total - gpu + doubled))


def _on_gpu(key: str, n: int, n_blocks: int) -> bool:
    block = block_of(key)
    if block is None:
        return key == HEAD_KEY and n > n_blocks
    return block >= n_blocks - n


def _doubles(room: Room, n: int, n_blocks: int) -> bool:
    """Whether both sides hold the embedding, since it is the head too."""
    return n > n_blocks and HEAD_KEY not in room.sheet.by_key and EMBEDDING_KEY in room.sheet.by_key


def _unreached(room: Room, budgets: Budgets, beside: int) -> str:
    least = beside + reachable_range(items(room.settled.linears))[0] // 8
    sizes = f"--gpu-bytes {budgets.gpu_bytes} --cpu-bytes {budgets.cpu_bytes}"
    layers = "" if budgets.n_gpu_layers is None else f" with --n-gpu-layers {budgets.n_gpu_layers}"
    return f"{sizes}: the smallest file, {least} bytes, fits in no split{layers}; give either more"
