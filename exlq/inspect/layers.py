"""One figure of every linear as a grid of layers and kinds."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from exlq.errors import ConfigError
from exlq.inspect.record import Entry, Inspection

LAYER = re.compile(r"(?:.*\.)?(?:layers|blk|h|blocks)\.(\d{1,9})\.(.+?)(?:\.weight)?")


@dataclass(frozen=True)
class Grid:
    """`values[layer][kind]`; `figure` says what they are, `kinds` gives the order of the columns."""

    figure: str
    kinds: tuple[str, ...]
    values: Mapping[int, Mapping[str, float]]


def by_layer(found: Inspection) -> Grid:
    """Bits per weight of what is stored, of a measurement the errors at about 4 bits; matrices alone.

    A measurement has one row for a layer, of the first format that it has.

    Raises:
        ConfigError: where nothing belongs to a layer.
    """
    measured = found.kind == "measurement"
    figure = "error at about 4 bits" if measured else "bits per weight"
    values: dict[int, dict[str, float]] = {}
    kinds: dict[str, None] = {}
    for entry in found.entries:
        place, value = _place(entry), entry.error if measured else entry.bits
        if place is not None and value is not None:
            kinds[place[1]] = None
            values.setdefault(place[0], {}).setdefault(place[1], value)
    if not values:
        raise ConfigError(f"--by-layer: {found.path} lists no matrices of layers; leave the flag away")
    return Grid(figure, tuple(kinds), dict(sorted(values.items())))


def _place(entry: Entry) -> tuple[int, str] | None:
    """Layer and kind of a matrix of a block; a measurement says no shapes."""
    match = LAYER.fullmatch(entry.name)
    if match is None or len(entry.shape) == 1:
        return None
    return int(match[1]), match[2].rpartition(".")[2]
