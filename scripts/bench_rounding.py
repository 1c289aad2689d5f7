"""Time of rounding one linear by n options at once, over its arithmetic floor and over n separate calls.

Usage: python scripts/bench_rounding.py [--size 4096] [--options 30] [--threads 2] [--repeat 3]

The floor is what the arithmetic alone would take: factoring the Hessian, out·in² floating point
operations per option at the rate of a float32 matrix product measured in the same run, and the
searches for scales run by themselves.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from exlq.formats.exl2_codec import Exl2Codec
from exlq.formats.exl2_options import OPTIONS
from exlq.memory import PeakMemory
from exlq.numerics import hessian
from exlq.numerics.hessian import Factor
from exlq.numerics.precision import quick_products
from exlq.numerics.threads import in_parallel
from exlq.pipeline import parts, trial
from exlq.types import LinearSpec, Option

CODEC = Exl2Codec()


@quick_products()
def main() -> int:
    """Prints both ratios; exit code 1 if one is above its bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--options", type=int, default=len(OPTIONS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    return compare(arguments.size, _spread(arguments.options), arguments.repeat)


def compare(size: int, options: Sequence[Option], repeat: int) -> int:
    """One linear of `size` × `size`, all `options` at once and one by one."""
    spec = LinearSpec("bench", size, size)
    weight, covariance = made_linear(size)
    factor = hessian.factor(covariance)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}")
    print(f"{len(options)} options of a {size} × {size} linear, {repeat} runs each")
    product = torch.randn(size, size)
    rate = 2 * size**3 / report("matrix product", seconds(lambda: product @ product, repeat))
    factoring = report("factor", seconds(lambda: hessian.factor(covariance), repeat))
    searching = report("scale searches", seconds(lambda: search(spec, options, weight, factor), repeat))
    sweeping = len(options) * size**3 / rate
    print(f"{'sweeps, floor':>16} {sweeping:9.2f} s   at {rate / 1e9:.0f} GFLOP/s")

    with PeakMemory() as peak:
        pairs = [pair(spec, options, weight, covariance) for _ in range(repeat)]
    together = report("all at once", [first for first, _ in pairs])
    apart = report("one by one", [second for _, second in pairs])
    floor = factoring + sweeping + searching
    print(f"over the floor of {floor:.2f} s: {together / floor:.2f} (at most 2.5)")
    print(f"over {len(options)} separate calls: {together / apart:.2f} (at most 0.5)")
    print(f"peak anonymous memory {peak.bytes / 2**20:.0f} MiB, of which {peak.before / 2**20:.0f} before")
    return int(together > 2.5 * floor or together > 0.5 * apart)


def attempt(spec: LinearSpec, options: Sequence[Option], weight: Tensor, covariance: Tensor) -> None:
    """Factor, and round all rows by the options, as a measurement does."""
    factor = hessian.factor(covariance)

    def sweep(batch: Sequence[Option]) -> int:
        return sum(1 for _ in trial.sweeps(CODEC, spec, batch, weight, factor))

    batches = list(parts.option_batches(options, spec.in_features, weight.device))
    in_parallel(sweep, batches, weight.device)


def pair(
    spec: LinearSpec, options: Sequence[Option], weight: Tensor, covariance: Tensor
) -> tuple[float, float]:
    """Seconds of all at once and, right after it, of one by one: a busy machine is busy for both."""
    together = seconds(lambda: attempt(spec, options, weight, covariance), 1)
    apart = seconds(lambda: one_by_one(spec, options, weight, covariance), 1)
    return together[0], apart[0]


def one_by_one(spec: LinearSpec, options: Sequence[Option], weight: Tensor, covariance: Tensor) -> None:
    """The same in as many separate calls as there are options."""
    for option in options:
        attempt(spec, [option], weight, covariance)


def search(spec: LinearSpec, options: Sequence[Option], weight: Tensor, factor: Factor) -> None:
    """The scale searches of all groups of all options, on the unrounded weights."""

    def open_groups(batch: Sequence[Option]) -> None:
        for rows in parts.parts(weight, factor.perm, len(batch)):
            turned = weight[rows].T[factor.perm].contiguous()
            grid = CODEC.grid(spec, batch, factor, turned, None)
            current = turned.unsqueeze(1).expand(-1, len(batch), -1)
            for column in range(0, spec.in_features, 32):
                grid.open(column, current[column:])

    batches = list(parts.option_batches(options, spec.in_features, weight.device))
    in_parallel(open_groups, batches, weight.device)


def made_linear(size: int) -> tuple[Tensor, Tensor]:
    """A weight (out, in) and the Hessian of correlated inputs with a few strong channels."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.eye(size) + 0.02 * torch.randn(size, size, generator=generator)
    x = torch.randn(size, size, generator=generator) @ mixing
    x[:, :8] *= 10
    return 0.02 * torch.randn(size, size, generator=generator), x.T @ x / size


def seconds(run: Callable[[], object], repeat: int) -> list[float]:
    """Wall times of `repeat` runs, after one that is thrown away where there are several."""
    if repeat > 1:
        run()
    times = []
    for _ in range(repeat):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return times


def report(label: str, times: list[float]) -> float:
    """Prints median and spread; the median."""
    median = statistics.median(times)
    print(f"{label:>16} {median:9.2f} s  ×{max(times) / min(times):4.2f}", flush=True)
    return median


def _spread(n: int) -> list[Option]:
    """`n` of the options, evenly from fewest to most bits."""
    last = len(OPTIONS) - 1
    return [OPTIONS[round(i * last / max(1, n - 1))] for i in range(n)]


if __name__ == "__main__":
    sys.exit(main())
