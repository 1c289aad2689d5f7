"""Rate and error of our rounding to GGUF blocks against ggml's own, type by type.

Usage: python scripts/bench_kquants.py [--threads 2] [--size 4096] [--types Q4_K,Q6_K] [--search fast,best]
           [--repeat 5]

Both sides get the same square matrix (Student's t, a few channels far more important than the rest) and
the same threads: ggml's rows are split among Python threads, which it lets run. Ours and ggml's runs take
turns. Times are ratios of medians, errors Σ importance · (weight - value)² over ggml's. The rate
of ours is that of the rounding; "packed" counts its way to bytes too, which ggml's includes.

Exit code 1 if a fast search leaves more error than ggml, or if Q4_K with importance is slower than ggml.
"""

from __future__ import annotations

import argparse
import ctypes
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from exlq.formats.gguf_blocks import BLOCK_TYPES
from exlq.formats.gguf_blocks.block import BlockType
from exlq.formats.gguf_blocks.fit import SEARCHES, fit

Outcome = TypeVar("Outcome")


def main() -> int:
    """Prints a line for every type, importance and search."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--types", default=",".join(BLOCK_TYPES))
    parser.add_argument("--search", default=",".join(SEARCHES))
    parser.add_argument("--repeat", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    weight, importance = made_matrix(arguments.size)
    print(
        f"torch {torch.__version__}, {arguments.threads} threads, {platform.machine()}, size {arguments.size}"
    )
    print(
        f"{'type':8}{'importance':12}{'search':8}{'ggml':>15}{'ours':>15}  Mweights/s and spread", flush=True
    )
    failed = False
    for name in arguments.types.split(","):
        for factors in (importance, None):
            for line in compare(
                BLOCK_TYPES[name], weight, factors, arguments.search.split(","), arguments.repeat
            ):
                print(line.text(), flush=True)
                failed |= line.fails()
    return int(failed)


@dataclass(frozen=True)
class Line:
    """One comparison: seconds of every run, and errors."""

    kind: BlockType
    search: str
    weighted: bool
    weights: int
    theirs: Sequence[float]
    ours: Sequence[float]
    packing: Sequence[float]
    error: float  # over theirs

    @property
    def time(self) -> float:
        return statistics.median(self.ours) / statistics.median(self.theirs)

    @property
    def packed_time(self) -> float:
        return self.time + statistics.median(self.packing) / statistics.median(self.theirs)

    def text(self) -> str:
        label = f"{self.kind.name:8}{'yes' if self.weighted else 'no':12}{self.search:8}"
        rates = self._rate(self.theirs) + self._rate(self.ours)
        return (
            f"{label}{rates}  time {self.time:6.3f}, packed {self.packed_time:6.3f}  error {self.error:.4f}"
        )

    def fails(self) -> bool:
        slow = self.kind.name == "Q4_K" and self.weighted and self.packed_time > 1
        return self.search == "fast" and (slow or self.error > 1)

    def _rate(self, times: Sequence[float]) -> str:
        return f"{self.weights / statistics.median(times) / 1e6:9.1f} ×{max(times) / min(times):4.2f}"


def compare(
    kind: BlockType, weight: Tensor, importance: Tensor | None, searches: Sequence[str], repeat: int
) -> Iterator[Line]:
    """Every search against ggml, in turns; a first turn is thrown away."""
    theirs: list[float] = []
    ours: dict[str, list[float]] = {search: [] for search in searches}
    packing: dict[str, list[float]] = {search: [] for search in searches}
    errors = {}
    for _ in range(repeat + 1):
        stored, spent = timed(partial(ggml, kind, weight, importance))
        theirs.append(spent)
        for search in searches:
            fields, spent = timed(partial(fit, kind, weight, importance, search=search))
            ours[search].append(spent)
            packing[search].append(timed(partial(kind.pack, fields))[1])
            errors[search] = squared_error(weight, kind.values(fields), importance)
    reference = squared_error(weight, kind.unpack(stored), importance)
    for search in searches:
        times = theirs[1:], ours[search][1:], packing[search][1:]
        error = errors[search] / reference
        yield Line(kind, search, importance is not None, weight.numel(), *times, error)


def ggml(kind: BlockType, weight: Tensor, importance: Tensor | None) -> Tensor:
    """(rows, row_bytes) uint8 from `ggml_quantize_chunk`, on as many threads as torch has."""
    rows, in_features = weight.shape
    blocks = torch.empty(rows, in_features // kind.block_size * kind.type_size, dtype=torch.uint8)
    threads = torch.get_num_threads()
    per_thread = -(-rows // threads)
    factors = None if importance is None else importance.data_ptr()

    def part(start: int) -> None:
        count = min(per_thread, rows - start)
        arguments = weight.data_ptr(), blocks.data_ptr(), start * in_features, count, in_features, factors
        LIBRARY.ggml_quantize_chunk(kind.ggml_type, *arguments)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(part, range(0, rows, per_thread)))
    return blocks


def load_ggml() -> ctypes.CDLL:
    """The library inside xllamacpp, whole."""
    import xllamacpp

    library = ctypes.CDLL(str(Path(xllamacpp.__file__).parent / "xllamacpp.abi3.so"))
    library.ggml_cpu_init()
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
    return library


def made_matrix(size: int) -> tuple[Tensor, Tensor]:
    """Weights (size, size) and the importance of their input channels."""
    random = torch.Generator().manual_seed(0)
    chi = torch.zeros(size, size)
    for _ in range(5):
        chi += torch.randn(size, size, generator=random).square() / 5
    weight = 0.02 * torch.randn(size, size, generator=random) / chi.sqrt()
    importance = torch.randn(size, generator=random).exp()
    importance[torch.randint(size, (8,), generator=random)] *= 1000
    return weight, importance


def squared_error(weight: Tensor, values: Tensor, importance: Tensor | None) -> float:
    factors = torch.ones(weight.shape[1]) if importance is None else importance
    return ((weight - values).square().double() @ factors.double()).sum().item()


def timed(run: Callable[[], Outcome]) -> tuple[Outcome, float]:
    begin = time.perf_counter()
    outcome = run()
    return outcome, time.perf_counter() - begin


LIBRARY = load_ggml()

if __name__ == "__main__":
    sys.exit(main())
