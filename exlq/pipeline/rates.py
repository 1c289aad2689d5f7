"""How fast the machine multiplies matrices here and now."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from exlq.pipeline.profiled import Rates

SIDES = {"cuda": 8192}  # of the matrices, by device; large enough for its full rate
SIDE = 1024  # of others
REPEATS = 2


class RateSamples:
    """Times of matrix products in float32 and float64, taken now and then; their median counts."""

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self._device, self._clock = device, clock
        self._side = SIDES.get(device.type, SIDE)
        self._times: dict[torch.dtype, list[float]] = {torch.float32: [], torch.float64: []}

    def take(self) -> None:
        """A few products of each type, after one that warms up."""
        for dtype, times in self._times.items():
            if dtype == torch.float64 and self._device.type == "mps":
                continue  # has none: factors are taken on the CPU there
            a = torch.ones(self._side, self._side, dtype=dtype, device=self._device)
            out = a @ a
            for _ in range(REPEATS):
                waited(self._device)
                begin = self._clock()
                torch.mm(a, a, out=out)
                waited(self._device)
                times.append(self._clock() - begin)

    def medians(self) -> Rates:
        single, double = (
            2 * self._side**3 / statistics.median(t) if t else 0.0 for t in self._times.values()
        )
        return Rates(single, double or single)


def waited(device: torch.device) -> None:
    """Returns once a GPU has done what it was given; at once on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
