"""The tables of bench_scale, in markdown."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Sequence

import torch

from exlq.pipeline.profiled import StageWork, Work
from scripts.random_llama import Shape
from scripts.scale_marginal import Margin
from scripts.scale_run import Run, Whole

GB = 1e9
BELIEVED = 0.9  # of the floor, that noise of the clock and of the rate may come to
WORK_HEADS = ("", "seconds", "floor", "over floor", "GFLOP/s")


def machine(threads: int) -> str:
    load = f", load {os.getloadavg()[0]:.1f}" if os.name == "posix" else ""
    return (
        f"torch {torch.__version__}, {threads} threads of {os.cpu_count()} cores{load}, {platform.machine()}"
    )


def whole(shape: Shape, runs: Sequence[Run], found: Whole, tokens: int) -> str:
    """The first run by stage and kind, then the model extrapolated from both."""
    run = runs[0]
    rates = run.profiled.rates
    seen = [row for stage in run.profiled.stages if stage.name in run.tokens for row in stage_rows(stage)]
    told = [_row(name, found.stage(name)) for name in found.works]
    counts = " and ".join(f"{each.tokens['measuring']:,}" for each in runs)
    return "\n".join(
        [
            f"\n### {shape.name}: {blocks_told(run.blocks)}, {run.tokens['measuring']:,} tokens\n",
            f"Vocabulary {shape.vocabulary:,}; matrix products at {rates.float32 / GB:,.0f} GFLOP/s in "
            f"float32, {rates.float64 / GB:,.0f} in float64.\n",
            table(WORK_HEADS, seen),
            f"\nExtrapolated from {counts} tokens to {shape.blocks} blocks and {tokens:,} tokens in each "
            "pass (8,192 for gradients):\n",
            table(WORK_HEADS, [*told, _row("whole", found.all)]),
            f"\nWhole over floor {_ratio(found.all)} (at most 2.0). With twice the options: "
            f"{found.doubled_options:.2f} × the time (at most 1.15).",
            f"\nFurthest over the floor in seconds: {_worst(found)}.",
            *_doubts(found),
        ]
    )


def _doubts(found: Whole) -> list[str]:
    """A line where the machine was so busy that a line through two runs lies below the floor."""
    below = [
        f"{work.kind} of {stage}"
        for stage, works in found.works.items()
        for work in works
        if work.seconds < BELIEVED * work.floor_s
    ]
    told = f"\nNot to be believed, below the floor: {', '.join(below)}. Run again on a quiet machine."
    return [told] if below else []


def blocks_told(n: int) -> str:
    return "1 block" if n == 1 else f"{n} blocks"


def _worst(found: Whole) -> str:
    """Kinds of work by how many seconds they take beyond their floor."""
    lost = {
        f"{work.kind} of {stage}": work.seconds - work.floor_s
        for stage, works in found.works.items()
        for work in works
    }
    first = sorted(lost.items(), key=lambda item: -item[1])[:6]
    return ", ".join(f"{name} {seconds:,.0f} s" for name, seconds in first)


def stage_rows(stage: StageWork) -> Iterable[tuple[str, ...]]:
    """A stage, then its kinds of work."""
    yield _row(f"**{stage.name}**", stage.whole)
    yield from (_row(work.kind, work) for work in stage.kinds)


def _row(name: str, work: Work) -> tuple[str, ...]:
    rate = f"{work.flop / work.seconds / GB:,.1f}" if work.flop and work.seconds else "—"
    floor = f"{work.floor_s:,.2f}" if work.flop else "—"
    return name, f"{work.seconds:,.2f}", floor, _ratio(work), rate


def _ratio(work: Work) -> str:
    return "—" if work.over_floor is None else f"{work.over_floor:,.2f}"


def marginal(hidden: int, found: Sequence[Margin]) -> str:
    """What an option more takes."""
    rows = [
        (
            each.format,
            f"{each.options} → {2 * each.options}",
            f"{each.once_s:.2f}",
            f"{each.more_s:.2f}",
            f"{each.floor_s:.2f}",
            f"{each.over_floor:.2f}",
        )
        for each in found
    ]
    heads = (
        "",
        "options",
        "seconds",
        "more for twice as many",
        "floor of those more",
        "over floor (at most 2.5)",
    )
    return f"\n### One more option of a {hidden} × {hidden} linear\n\n{table(heads, rows)}"


def by_blocks(shape: Shape, run: Run) -> str:
    """Seconds and anonymous memory as blocks are done."""
    stages = dict.fromkeys(mark.stage for mark in run.marks)
    rows = []
    for stage in stages:
        marks = [mark for mark in run.marks if mark.stage == stage]
        rows += [
            (
                stage,
                str(m.blocks),
                f"{m.seconds:.2f}",
                f"{m.seconds / m.blocks:.2f}",
                f"{m.anonymous_bytes / GB:.2f}",
            )
            for m in marks
        ]
    heads = ("", "blocks done", "seconds", "a block", "anonymous GB then")
    peaks = [(s.name, _gb(s.peak_anonymous_bytes)) for s in run.profiled.stages if s.name in run.tokens]
    title = f"\n### {shape.name}: by blocks, {run.tokens['measuring']:,} tokens\n"
    return "\n".join([title, table(heads, rows), "", table(("", "peak, anonymous GB"), peaks)])


def by_tokens(shape: Shape, runs: Sequence[Run]) -> str:
    """Seconds of a stage against the tokens that went through it."""
    rows = [
        (
            stage.name,
            f"{run.tokens[stage.name]:,}",
            f"{stage.whole.seconds:.2f}",
            _ratio(stage.whole),
            _gb(stage.peak_anonymous_bytes),
        )
        for name in runs[0].tokens
        for run in runs
        for stage in run.profiled.stages
        if stage.name == name
    ]
    heads = ("", "tokens", "seconds", "over floor", "peak, anonymous GB")
    return f"\n### {shape.name}: by tokens, {blocks_told(runs[0].blocks)}\n\n{table(heads, rows)}"


def memory(runs: Sequence[Run], most: int) -> str:
    """Peaks of every stage, the higher of the runs, and the highest of all against its bound."""
    peaks: dict[str, int] = {}
    for stage in (stage for run in runs for stage in run.profiled.stages if stage.name in run.tokens):
        peaks[stage.name] = max(peaks.get(stage.name, 0), stage.peak_anonymous_bytes or 0)
    highest = max(peaks.values())
    rows = [(name, _gb(size)) for name, size in peaks.items()]
    verdict = f"Highest {highest / GB:.2f} GB of anonymous memory (at most {most / GB:.0f})."
    return "\n".join(["", table(("", "peak, anonymous GB"), rows), "", verdict])


def _gb(size: int | None) -> str:
    return "—" if size is None else f"{size / GB:.2f}"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown, numbers to the right."""
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|--:" * (len(heads) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
