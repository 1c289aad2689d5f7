"""Tables of `exlq plan`, for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group
from rich.table import Table

from exlq.report.eta import duration
from exlq.sizes import format_bytes
from exlq.sizing.advice import RUNTIMES, Advice
from exlq.sizing.fitting import Fit
from exlq.sizing.running import Running


def plan_view(advice: Advice, model: str, memory_from: str, rate: float) -> Group:
    """What fits, the common sizes by context, and what the conversion takes."""
    return Group(_largest(advice, model, memory_from), _sizes(advice), _costs(advice, rate))


def _largest(advice: Advice, model: str, memory_from: str) -> Table:
    shape, room = advice.shape, advice.room
    table = Table(title="What fits", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("model", f"{model} ({shape.architecture}, {shape.n_blocks} blocks)")
    table.add_row("memory", f"{format_bytes(room.memory)} ({memory_from})")
    table.add_row("context", f"{room.context:,} tokens, KV cache {room.cache}")
    for what, found in _found(advice):
        table.add_row(what, found)
    for note in advice.notes:
        table.add_row("note", note)
    return table


def _found(advice: Advice) -> Iterator[tuple[str, str]]:
    for name in advice.formats:
        told = "nothing fits"
        if name in advice.bits:
            bits, fit = advice.bits[name]
            told = f"-b {bits:.2f}: {_parts(fit.running)}"
        yield f"{name}, bits per weight", told
    if "gguf" not in advice.formats:
        return
    recipe, size = advice.recipe, advice.file_bytes
    told = "none fits" if recipe is None else f"{recipe.choice}: {_parts(recipe.running)}"
    yield "gguf, recipe", told
    yield (
        "gguf, mixed types",
        "nothing fits" if size is None else f"--file-size {size} ({format_bytes(size)})",
    )


def _parts(running: Running) -> str:
    beside = {"cache": running.cache, "buffers": running.buffers, "margin": running.margin}
    told = "".join(f" + {name} {format_bytes(n)}" for name, n in beside.items())
    return f"{format_bytes(running.weights)}{told} = {format_bytes(running.total)}"


def _sizes(advice: Advice) -> Table:
    table = Table(title="Memory by size and context; what does not fit is in brackets", title_justify="left")
    table.add_column("for")
    table.add_column("size", style="bold")
    table.add_column("file", justify="right")
    for context in advice.contexts:
        table.add_column(f"{context:,}", justify="right")
    before = ""
    for row in advice.table:
        if before not in ("", row[0].format):
            table.add_section()
        before = row[0].format
        totals = [_total(fit, advice.room.memory) for fit in row]
        table.add_row(RUNTIMES[before], row[0].choice, format_bytes(row[0].running.weights), *totals)
    return table


def _total(fit: Fit, memory: int) -> str:
    told = format_bytes(fit.running.total)
    return told if fit.running.total <= memory else f"({told})"


def _costs(advice: Advice, rate: float) -> Table:
    table = Table(
        title=f"The conversion to {' and '.join(advice.formats)}, about, at {rate / 1e9:,.0f} GFLOP/s",
        title_justify="left",
    )
    for heading in ("--effort", "tokens", "measured on", "time", "of which measuring", "RAM", "disk"):
        table.add_column(heading, justify="left" if heading == "--effort" else "right")
    for cost in advice.costs:
        table.add_row(
            cost.effort,
            f"{cost.quantize_tokens:,}",
            f"{cost.measure_tokens:,}",
            duration(cost.total_s),
            duration(cost.measuring_s),
            format_bytes(cost.memory_bytes),
            format_bytes(cost.disk_bytes),
        )
    return table
