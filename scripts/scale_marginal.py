"""What one more option of a linear takes, over what its arithmetic would."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from exlq.formats.codec import Codec
from exlq.formats.codecs import CODECS
from exlq.numerics import hessian
from exlq.numerics.precision import quick_products
from exlq.pipeline import arithmetic, kinds, trial
from exlq.pipeline.profile import Recorder
from exlq.types import LinearSpec, Option
from scripts.bench_rounding import made_linear
from scripts.scale_run import spread


@dataclass(frozen=True)
class Margin:
    """Medians of trying `options` options, and of how much longer twice as many take; the floor of that.

    A few options may not keep all threads busy, and more of them then seem to cost nothing.
    """

    format: str
    options: int
    once_s: float
    more_s: float
    floor_s: float

    @property
    def over_floor(self) -> float:
        return self.more_s / self.floor_s


@dataclass(frozen=True)
class Problem:
    """A square linear, what is known of its input, and what errors of its outputs cost."""

    spec: LinearSpec
    weight: Tensor
    evidence: trial.Evidence
    costs: Tensor

    @classmethod
    def made(cls, size: int) -> Problem:
        weight, second = made_linear(size)
        factor = hessian.factor(second)
        heldout = second[factor.perm][:, factor.perm]
        spec = LinearSpec("model.layers.0.mlp.up_proj", size, size)
        return cls(spec, weight, trial.Evidence(factor, heldout), torch.ones(size))

    def tried(self, codec: Codec[Any], options: Sequence[Option]) -> tuple[float, float]:
        """Seconds and floor of measuring these options."""
        recorder, generator = Recorder(self.weight.device), torch.Generator().manual_seed(0)
        begin = time.perf_counter()
        with recorder.spent(kinds.TRIALS, arithmetic.trials(self.spec, len(options))):
            given = recorder.codec(codec), self.spec, options, self.weight, self.evidence, self.costs
            trial.try_options(*given, generator)
        return time.perf_counter() - begin, recorder.found().whole.floor_s


@quick_products()
def marginal(name: str, size: int, n: int | None, repeat: int) -> Margin:
    """Of a `size` × `size` linear by `n` options of a format, from its fewest bits to its most; None: all."""
    problem, codec = Problem.made(size), CODECS[name]
    options = codec.options(problem.spec)
    options = options if n is None else spread(options, n)
    problem.tried(codec, options[:1])  # warms up
    runs = [(problem.tried(codec, options), problem.tried(codec, options * 2)) for _ in range(repeat)]
    more_s = statistics.median(twice - once for (once, _), (twice, _) in runs)
    floor_s = statistics.median(twice - once for (_, once), (_, twice) in runs)
    return Margin(name, len(options), statistics.median(once for (once, _), _ in runs), more_s, floor_s)
