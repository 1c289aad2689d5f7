"""Tables of two columns, for a terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich.table import Table


def pairs(title: str, rows: Iterable[tuple[str, str]]) -> Table:
    """What, and its value."""
    built = Table(title=title, show_header=False, title_justify="left")
    built.add_column(style="bold")
    built.add_column(overflow="fold")
    for name, value in rows:
        built.add_row(name, value)
    return built
