"""Where the time of a conversion went, as rows of text: for a terminal and for a report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

from exlq.sizes import format_bytes

HEADINGS = ("", "seconds", "floor", "over floor", "GFLOP/s", "peak memory")
Row = tuple[str, ...]


def profile_rows(profile: Mapping[str, Any]) -> list[Row]:
    """A head, then every stage with its kinds of work below it, then all of it; from `summary.json`."""
    return [HEADINGS, *(row for stage in profile["stages"] for row in _stage(stage)), _row("all", profile)]


def caption(profile: Mapping[str, Any]) -> str:
    """What the floor is taken at."""
    single, double = (profile["gemm_flop_per_s"][name] / 1e9 for name in ("float32", "float64"))
    return (
        f"floor: the operations at {single:,.0f} GFLOP/s, factors at {double:,.0f}: matrix products of "
        f"float32 and float64 on {profile['device']}, {profile['threads']} threads, timed before every stage "
        "and at the end"
    )


def profile_table(profile: Mapping[str, Any]) -> Table:
    """For a terminal."""
    heads, *rows = profile_rows(profile)
    built = Table(title="Where the time went", title_justify="left", caption=caption(profile))
    for index, heading in enumerate(heads):
        built.add_column(heading, justify="right" if index else "left", no_wrap=not index)
    for row in rows:
        if not row[0].startswith(" "):
            built.add_section()
        built.add_row(*row)
    return built


def _stage(stage: Mapping[str, Any]) -> Iterator[Row]:
    yield _row(stage["stage"], stage)
    yield from (_row(f"  {work['kind']}", work) for work in stage["kinds"])


def _row(name: str, work: Mapping[str, Any]) -> Row:
    flop, seconds = work["flop"], work["seconds"]
    ratio = work["over_floor"]
    return (
        name,
        f"{seconds:,.2f}",
        f"{work['floor_s']:,.2f}" if flop else "—",
        f"{ratio:,.2f}" if ratio is not None else "—",
        f"{flop / seconds / 1e9:,.1f}" if flop and seconds else "—",
        _memory(work),
    )


def _memory(work: Mapping[str, Any]) -> str:
    found = (("", work.get("peak_anonymous_bytes")), (" on the GPU", work.get("peak_device_bytes")))
    return ", ".join(f"{format_bytes(size)}{where}" for where, size in found if size is not None)
