"""Tables of `exlq inspect`, for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import Group, RenderableType
from rich.table import Table

from exlq.inspect import Entry, Grid, Inspection
from exlq.inspect.measured import SHOWN_BITS
from exlq.report.pairs import pairs
from exlq.sizes import format_bytes


class Column(NamedTuple):
    """A heading, what stands under it for an entry, and whether it is a number."""

    heading: str
    shown: Callable[[Entry], str]
    number: bool = True


def inspection_view(found: Inspection, grid: Grid | None = None, metadata: bool = False) -> Group:
    """Facts, totals by type, then the entries, or the grid in their place; metadata if wanted."""
    return Group(*_parts(found, grid, metadata))


def printable(text: object) -> str:
    """A text of a file without what would steer a terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def _parts(found: Inspection, grid: Grid | None, metadata: bool) -> Iterator[RenderableType]:
    yield _facts(f"{printable(found.path)} ({found.kind})", found.facts, found.notes)
    if found.totals:
        yield _totals(found)
    if metadata and found.metadata:
        yield _facts("Metadata", found.metadata, ())
    if grid is not None:
        yield _grid(grid)
    elif found.entries:
        yield _entries(found)


def _facts(title: str, facts: Mapping[str, Any], notes: tuple[str, ...]) -> Table:
    rows = [(printable(name), _fact(name, value)) for name, value in facts.items()]
    return pairs(title, [*rows, *(("note", printable(note)) for note in notes)])


def _fact(name: str, value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{printable(key)} {_fact(key, of)}" for key, of in value.items())
    if isinstance(value, bool) or not isinstance(value, int):
        return printable(value)
    if name.endswith("bytes"):
        return f"{value:,} ({format_bytes(value)})"
    return f"{value:,}"


def _totals(found: Inspection) -> Table:
    whole = sum(total.n_bytes for total in found.totals)
    rows = [
        [
            printable(total.type),
            f"{total.entries:,}",
            f"{total.weights:,}",
            f"{total.n_bytes:,}",
            f"{8 * total.n_bytes / max(1, total.weights):.3f}",
            f"{100 * total.n_bytes / max(1, whole):.1f} %",
        ]
        for total in found.totals
    ]
    return _table("By type", ["type", "entries", "weights", "bytes", "bits per weight", "share"], rows)


def _entries(found: Inspection) -> Table:
    columns = [column for column in COLUMNS[found.kind] if any(column.shown(e) for e in found.entries)]
    rows = [[column.shown(entry) for column in columns] for entry in found.entries]
    words = sum(not column.number for column in columns)
    return _table("Entries", [column.heading for column in columns], rows, words)


def _grid(grid: Grid) -> Table:
    digits = 4 if grid.figure.startswith("error") else 2
    rows = [
        [str(layer), *(f"{values[kind]:.{digits}f}" if kind in values else "" for kind in grid.kinds)]
        for layer, values in grid.values.items()
    ]
    return _table(grid.figure.capitalize(), ["layer", *map(printable, grid.kinds)], rows)


def _table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> Table:
    """A table whose first columns are words; as wide as it must be, for a name cut off helps nobody."""
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    built = Table(title=title, title_justify="left", width=sum(widths) + 3 * len(widths) + 1)
    for index, heading in enumerate(headings):
        built.add_column(heading, justify="left" if index < words else "right", no_wrap=True)
    for row in rows:
        built.add_row(*row)
    return built


def _figure(value: float | None, digits: int = 3) -> str:
    """A number to so many figures, nothing where there is none."""
    return "" if value is None else f"{value:.{digits}g}"


def _ways(entry: Entry) -> str:
    return "" if entry.ways is None else f"{entry.ways.least_bits:.2f} to {entry.ways.most_bits:.2f}"


def _error_at(bits: int) -> Callable[[Entry], str]:
    return lambda entry: "" if entry.ways is None else _figure(entry.ways.errors.get(bits))


NAME = Column("name", lambda entry: printable(entry.name), number=False)
TYPE = Column("type", lambda entry: printable(entry.type), number=False)
SHAPE = Column("shape", lambda entry: " × ".join(map(str, entry.shape)))
BITS = Column("bits", lambda entry: "" if entry.bits is None else f"{entry.bits:.3f}")
BYTES = Column("bytes", lambda entry: "" if entry.n_bytes is None else f"{entry.n_bytes:,}")
ERROR = Column("error", lambda entry: _figure(entry.error))
LOSS = Column("predicted KL", lambda entry: _figure(entry.loss))
SENSITIVITY = Column("sensitivity", lambda entry: _figure(entry.sensitivity))
STORED = (NAME, TYPE, SHAPE, BITS, BYTES)
COLUMNS: dict[str, tuple[Column, ...]] = {
    "model": STORED,
    "safetensors": STORED,
    "exl2": (*STORED, ERROR, LOSS, SENSITIVITY),
    "gguf": (*STORED, ERROR, LOSS, SENSITIVITY),
    "measurement": (
        NAME,
        Column("format", lambda entry: entry.type, number=False),
        Column("options", lambda entry: "" if entry.ways is None else str(entry.ways.options)),
        Column("bits", _ways),
        *(Column(f"error at {bits}", _error_at(bits)) for bits in SHOWN_BITS),
        SENSITIVITY,
    ),
    "job": (),
}
