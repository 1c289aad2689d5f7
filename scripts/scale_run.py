"""The passes of a conversion over the first blocks of a model, profiled, and what follows for a whole one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from exlq.formats.codec import Codec, Role
from exlq.formats.codecs import CODECS
from exlq.measurement import Measurement
from exlq.memory import anonymous_bytes
from exlq.numerics.precision import quick_products
from exlq.pipeline import kinds, measure, quantize, sensitivity
from exlq.pipeline.config import ConvertConfig
from exlq.pipeline.plan import Plan, make_plan
from exlq.pipeline.profiled import Profiled, Work, summed
from exlq.pipeline.progress import silent
from exlq.pipeline.rounding import Rounding
from exlq.pipeline.state import machine
from exlq.types import LinearSpec, Option
from exlq.workspace import Workspace

GRADIENTS, MEASURING = "gradients", "measuring"
OF_OPTIONS = (kinds.TRIALS, kinds.SCALES, kinds.DESCENTS)  # what grows with the options of a measurement
OF_TOKENS = (kinds.FORWARDS, kinds.BACKWARDS, kinds.HESSIANS, kinds.DRIFT, kinds.COUPLING, kinds.REST)
HEAD_BITS = 6
CHOSEN = {"exl2": 13, "gguf": 3}  # the option that blocks are quantized by: about 4 bits


class Enough(Exception):  # noqa: N818
    """Raised when as many blocks as asked for are done."""


@dataclass(frozen=True)
class Mark:
    """A block done: seconds since its stage began, and anonymous memory held then."""

    stage: str
    blocks: int
    seconds: float
    anonymous_bytes: int


@dataclass
class Marks:
    """A listener that notes every block, and ends a pass after so many."""

    blocks: int
    found: list[Mark] = field(default_factory=list)
    begin: float = 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.perf_counter()
        self.found.append(Mark(stage, done, now - self.begin, anonymous_bytes()))
        if done >= self.blocks:
            raise Enough


@dataclass(frozen=True)
class Run:
    """One profiled run over the first `blocks` blocks; `tokens` went through each stage."""

    blocks: int
    tokens: Mapping[str, int]
    profiled: Profiled
    marks: tuple[Mark, ...]

    def works(self) -> Iterator[tuple[str, Work]]:
        """Every kind of work with its stage, but for what lies outside of stages."""
        for stage in self.profiled.stages:
            yield from ((stage.name, work) for work in stage.kinds if stage.name != kinds.ELSEWHERE)


def settings(model: Path, out: Path, tokens: int, length: int, device: str = "cpu") -> ConvertConfig:
    """Both passes on so many tokens in rows of `length`; one more row is held out of the quantization."""
    rows = max(2, tokens // length)
    return ConvertConfig(
        in_dir=model,
        out_dir=out,
        bits=4.0,
        rows=rows + 1,
        measurement_rows=rows,
        length=length,
        measurement_length=length,
        random_share=0.0,
        device=device,
        profile=True,
    )


class FewOptions:
    """A codec that has but some of its options measured, from the fewest bits to the most."""

    def __init__(self, codec: Codec[Any], n: int) -> None:
        self._codec, self._n = codec, n

    def __getattr__(self, name: str) -> Any:
        return getattr(self._codec, name)

    def measured(self, spec: LinearSpec, role: Role) -> tuple[Option, ...]:
        return spread(self._codec.measured(spec, role), self._n)


def spread(options: tuple[Option, ...], n: int) -> tuple[Option, ...]:
    """At most `n` of them, evenly from the first to the last."""
    last = len(options) - 1
    return tuple(options[i] for i in sorted({round(i * last / max(1, n - 1)) for i in range(n)}))


@quick_products()
def run(
    config: ConvertConfig, work: Path, blocks: int, formats: Sequence[str], options: int | None = None
) -> Run:
    """Gradients through all blocks of the model, the other passes through the first `blocks`.

    Args:
        options: of each format that are measured; None: all.
    """
    plan, workspace = make_plan(config), Workspace(work)
    if options is not None:
        few = (cast("Codec[Any]", FewOptions(codec, options)) for codec in plan.codecs)
        plan = replace(plan, codecs=tuple(few))
    rows = plan.measurement_rows
    chosen = sensitivity.fisher_rows(rows.ids[~rows.heldout])
    with plan.profile.stage(GRADIENTS):
        path = work / "sensitivity.safetensors"
        found = sensitivity.fisher(
            plan.model, chosen, workspace, 0, path, silent, "row {}".format, plan.profile
        )
    tokens = {GRADIENTS: chosen.numel(), MEASURING: rows.ids.numel()}
    empty = Measurement(**plan.origin, extra={"made_with": machine(config.device)})

    def measured(marks: Marks) -> None:
        measure.measure(plan, found, empty, workspace, lambda _: None, marks)

    noted = list(_timed(plan, MEASURING, blocks, measured))
    for name in formats:
        tokens[f"quantizing {name}"] = plan.quantized_on.numel()
        rounding = Rounding(plan, CODECS[name], _options(plan, name), found)

        def quantized(marks: Marks, rounding: Rounding = rounding) -> None:
            for _ in quantize.quantized_linears(rounding, workspace, marks):
                pass

        noted += _timed(plan, f"quantizing {name}", blocks, quantized)
    profiled = plan.profile.found()
    assert profiled is not None
    return Run(blocks, tokens, profiled, tuple(noted))


def _timed(plan: Plan, stage: str, blocks: int, work: Callable[[Marks], None]) -> list[Mark]:
    marks = Marks(blocks, begin=time.perf_counter())
    with suppress(Enough), plan.profile.stage(stage):
        work(marks)
    return marks.found


def _options(plan: Plan, name: str) -> dict[str, Option]:
    def option(spec: LinearSpec) -> Option:
        return CODECS[name].options(spec)[CHOSEN[name]]

    head = CODECS[name].head_option(plan.model.head, HEAD_BITS)
    return {spec.key: option(spec) for spec in plan.linears} | {plan.model.head.key: head}


@dataclass(frozen=True)
class Line:
    """`fixed` + `per_token` · tokens of one block: seconds, or the floor's."""

    fixed: float
    per_token: float

    def at(self, tokens: float) -> float:
        return self.fixed + self.per_token * tokens

    @classmethod
    def through(cls, tokens: Sequence[float], values: Sequence[float]) -> Line:
        """Through two points; neither part below nothing, where the machine's noise would have it so."""
        (first, second), (low, high) = tokens, values
        slope = (high - low) / (second - first)
        fixed = low - slope * first
        if slope < 0:
            return cls((low + high) / 2, 0.0)
        return cls(fixed, slope) if fixed >= 0 else cls(0.0, (low + high) / (first + second))

    @classmethod
    def mean(cls, tokens: Sequence[float], values: Sequence[float]) -> Line:
        """Of what sees no tokens."""
        return cls(sum(values) / len(values), 0.0)


@dataclass(frozen=True)
class Whole:
    """A whole model's passes by stage and kind, extrapolated."""

    works: Mapping[str, tuple[Work, ...]]

    @property
    def all(self) -> Work:
        return summed("all", [work for works in self.works.values() for work in works])

    def stage(self, name: str) -> Work:
        return summed(name, self.works[name])

    @property
    def of_options_s(self) -> float:
        """Seconds of measuring that grow with the number of options."""
        return sum(work.seconds for work in self.works[MEASURING] if work.kind in OF_OPTIONS)

    @property
    def doubled_options(self) -> float:
        """The time with twice the options over the time, all the trials' work taken to double."""
        return (self.all.seconds + self.of_options_s) / self.all.seconds


def extrapolated(runs: Sequence[Run], blocks: int, tokens: int) -> Whole:
    """From two runs of different tokens to so many blocks and tokens; gradients have 8192 at most.

    Only the kinds of work that see tokens grow with them; of the others, the mean of both counts. The
    second run may have measured fewer options: what trials take is that of the first.
    """
    found: dict[str, list[Work]] = {}
    first = {(stage, work.kind): work for stage, work in runs[0].works()}
    for stage, work in runs[1].works():
        other = first.get((stage, work.kind), Work(work.kind, 0.0, 0.0, 0.0))
        if stage == MEASURING and work.kind in OF_OPTIONS:
            work = other
        counts = [each.tokens[stage] for each in runs]
        through = Line.through if work.kind in OF_TOKENS else Line.mean
        target = min(tokens, sensitivity.TOKENS) if stage == GRADIENTS else tokens
        seconds, flop, floor = (
            blocks * through(counts, [low / runs[0].blocks, high / runs[1].blocks]).at(target)
            for low, high in (
                (other.seconds, work.seconds),
                (other.flop, work.flop),
                (other.floor_s, work.floor_s),
            )
        )
        found.setdefault(stage, []).append(Work(work.kind, seconds, flop, floor))
    return Whole({stage: tuple(works) for stage, works in found.items()})
