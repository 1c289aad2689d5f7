"""What is found in a model, a measurement or a job, in one form for all of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from exlq.errors import ConfigError


@dataclass(frozen=True)
class Ways:
    """What one format offers a measured linear; `errors` by the bits they are at about: 3, 4, 5."""

    options: int
    least_bits: float
    most_bits: float
    errors: Mapping[int, float]


@dataclass(frozen=True)
class Entry:
    """One tensor, or one linear that is stored in several.

    `shape` is torch's, padding cut off; `n_bytes` and `bits` (per weight) count what is stored, a bias apart.
    `error`, `loss` and `sensitivity` are a measurement's, None where there is none; `type` is the dtype, the
    ggml type, the EXL2 option, or in a measurement the format.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    weights: int
    bits: float | None = None
    n_bytes: int | None = None
    error: float | None = None
    loss: float | None = None
    sensitivity: float | None = None
    ways: Ways | None = None


@dataclass(frozen=True)
class Total:
    """All entries of one type."""

    type: str
    entries: int
    weights: int
    n_bytes: int


@dataclass(frozen=True)
class Inspection:
    """What `path` is: `kind` is model, safetensors, measurement, exl2, gguf or job.

    `facts` are shown in their order; those whose names end in `bytes` are sizes. `entries` stand in the
    order of the file.
    """

    path: str
    kind: str
    facts: Mapping[str, Any]
    entries: tuple[Entry, ...] = ()
    notes: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def totals(self) -> tuple[Total, ...]:
        """By type, most bytes first; none where nothing is stored."""
        stored = [entry for entry in self.entries if entry.n_bytes is not None]
        types = dict.fromkeys(entry.type for entry in stored)
        found = [_total(kind, [entry for entry in stored if entry.type == kind]) for kind in types]
        return tuple(sorted(found, key=lambda total: -total.n_bytes))


def select(
    found: Inspection, pattern: str | None = None, kind: str | None = None, order: str | None = None
) -> Inspection:
    """The entries whose names `pattern` (a regular expression) finds, of one type, in an order of `ORDERS`.

    Raises:
        ConfigError: for a broken pattern, or when nothing is left.
    """
    entries = list(found.entries)
    if pattern is not None:
        expression = _compiled(pattern)
        entries = _some(entries, lambda entry: expression.search(entry.name) is not None, "--filter", pattern)
    if kind is not None:
        wanted = kind.casefold()
        entries = _some(entries, lambda entry: entry.type.casefold() == wanted, "--type", kind)
    if order is not None:
        entries.sort(key=ORDERS[order])
    return replace(found, entries=tuple(entries))


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as exc:
        raise ConfigError(f"--filter {pattern!r} is no regular expression: {exc}") from exc


def _some(entries: list[Entry], keep: Callable[[Entry], bool], flag: str, given: str) -> list[Entry]:
    kept = [entry for entry in entries if keep(entry)]
    if kept or not entries:
        return kept
    names = dict.fromkeys(entry.type if flag == "--type" else entry.name for entry in entries)
    some = ", ".join(list(names)[:6]) + (", …" if len(names) > 6 else "")
    raise ConfigError(f"{flag} {given!r} finds nothing here; there are {some}")


def _total(kind: str, entries: list[Entry]) -> Total:
    n_bytes = sum(entry.n_bytes or 0 for entry in entries)
    return Total(kind, len(entries), sum(entry.weights for entry in entries), n_bytes)


def _falling(value: Callable[[Entry], float | None]) -> Callable[[Entry], Any]:
    """Largest first, those without a value last, equal ones by name."""

    def key(entry: Entry) -> tuple[Any, ...]:
        found = value(entry)
        return (found is None, -(found or 0.0), natural(entry.name))

    return key


def natural(name: str) -> list[Any]:
    """Sorts `layers.2` before `layers.10`."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]{1,18})", name))]


ORDERS: dict[str, Callable[[Entry], Any]] = {
    "name": lambda entry: natural(entry.name),
    "bits": _falling(lambda entry: entry.bits),
    "bytes": _falling(lambda entry: entry.n_bytes),
    "error": _falling(lambda entry: entry.error),
    "sensitivity": _falling(lambda entry: entry.sensitivity),
}
