"""The measurement record: what every option of every linear costs and loses.

Complete enough to solve any target without the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from exlq.allocation import Choice, Item
from exlq.measurement.record import LinearRecord, Measurement, OptionRecord, shown
from exlq.measurement.stored import as_stored, dumps, load, save

__all__ = [
    "LinearRecord",
    "Measurement",
    "OptionRecord",
    "differences",
    "dumps",
    "load",
    "save",
    "to_items",
]


def to_items(measurement: Measurement) -> list[Item]:
    """The linears as the solver takes them; choice j is option j of the same (filtered) record."""
    return [
        Item(linear.key, tuple(Choice(o.total_bits, o.loss) for o in linear.options), linear.tie)
        for linear in measurement.linears
    ]


def differences(measured: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs, one line each: `calibration sha256: measured 0f3a…, now 77be…`.

    Nested mappings are compared entry by entry; tuples equal lists, as JSON knows only these.
    """
    old, new = (dict(_leaves(as_stored(side))) for side in (measured, now))
    lines = []
    for path in {**old, **new}:
        before, after = (side.get(path) for side in (old, new))
        if before != after:
            lines.append(f"{' '.join(path)}: measured {_brief(before)}, now {_brief(after)}")
    return lines


def _brief(value: Any) -> str:
    return "nothing" if value is None else shown(value).strip("'")


def _leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if not isinstance(value, dict):
        yield path, value
        return
    for name, below in value.items():
        yield from _leaves(below, (*path, name))
