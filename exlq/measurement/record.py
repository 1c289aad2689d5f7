"""What was measured: frozen records that cannot hold impossible values."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from exlq.errors import MeasurementError

SECTIONS = ("model", "calibration", "settings")
RESERVED = ("format", "version", *SECTIONS, "measurement")
MAX_EXACT = 1 << 53  # integers below are exact as JSON numbers everywhere
SHOWN_CHARACTERS = 60


@dataclass(frozen=True)
class OptionRecord:
    """One option tried on one linear; `err_se` is the standard error of a sampled `err`.

    `qparams` holds `bits` for EXL2 or `type` for GGUF. Raises MeasurementError on impossible values.
    """

    desc: str
    bpw: float
    total_bits: int
    err: float
    qparams: Mapping[str, Any]
    err_heldout: float
    loss: float
    err_se: float | None = None

    def __post_init__(self) -> None:
        _check_text("desc of an option", self.desc)
        here = f"option {shown(self.desc)}:"
        _check_integer(f"{here} total_bits", self.total_bits, least=0)
        for name in ("bpw", "err", "err_heldout", "loss"):
            _check_number(f"{here} {name}", getattr(self, name))
        if self.err_se is not None:
            _check_number(f"{here} err_se", self.err_se)
        if not isinstance(self.qparams, Mapping) or ("bits" in self.qparams) == ("type" in self.qparams):
            raise MeasurementError(
                f"{here} qparams is {shown(self.qparams)}, not an object with either bits or type"
            )
        if "type" in self.qparams:
            _check_text(f"{here} type", self.qparams["type"])
        elif not isinstance(self.qparams["bits"], list | tuple):
            raise MeasurementError(f"{here} bits is {shown(self.qparams['bits'])}, not a list")

    @property
    def format(self) -> str:
        """Name of the format that stores this option."""
        return "exl2" if "bits" in self.qparams else "gguf"


@dataclass(frozen=True)
class LinearRecord:
    """One linear with its options; `numel` counts weights without padding and bias.

    Linears of one `tie` take the same option. `sampled_rows` is the number of output rows the
    options were tried on, None where on all. Raises MeasurementError on impossible values.
    """

    key: str
    numel: int
    options: tuple[OptionRecord, ...]
    sensitivity: float | None = None
    tie: str | None = None
    sampled_rows: int | None = None

    def __post_init__(self) -> None:
        _check_text("key", self.key)
        _check_integer(f"{self.key}: numel", self.numel, least=1)
        if self.sensitivity is not None:
            _check_number(f"{self.key}: sensitivity", self.sensitivity)
        if self.tie is not None:
            _check_text(f"{self.key}: tie", self.tie)
        if self.sampled_rows is not None:
            _check_integer(f"{self.key}: sampled_rows", self.sampled_rows, least=1)
        if not self.options:
            raise MeasurementError(f"{self.key} has no options; measure it again")
        _check_distinct(f"{self.key}: option", [option.desc for option in self.options])
        for option in self.options:
            bpw = option.total_bits / self.numel
            if not math.isclose(option.bpw, bpw, rel_tol=1e-9):
                raise MeasurementError(
                    f"{self.key}, option {shown(option.desc)}: bpw is {option.bpw}, "
                    f"but total_bits / numel is {bpw}"
                )


@dataclass(frozen=True)
class Measurement:
    """All linears in model order, and what they were measured on.

    `extra` holds further top-level JSON values, kept as they are. Raises MeasurementError on a
    linear recorded twice, or tied linears with unlike options.
    """

    model: Mapping[str, Any]
    calibration: Mapping[str, Any]
    settings: Mapping[str, Any]
    linears: tuple[LinearRecord, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_distinct("linear", [linear.key for linear in self.linears])
        tied: dict[str, LinearRecord] = {}
        for linear in self.linears:
            first = linear if linear.tie is None else tied.setdefault(linear.tie, linear)
            if [o.desc for o in first.options] != [o.desc for o in linear.options]:
                raise MeasurementError(f"{first.key} and {linear.key} are tied but list different options")
        if taken := set(RESERVED) & set(self.extra):
            raise MeasurementError(f"extra values named {sorted(taken)} hide the record's own; rename them")

    @property
    def origin(self) -> dict[str, Any]:
        """The sections that say what was measured and how, as `differences` takes them."""
        return {name: getattr(self, name) for name in SECTIONS}

    def with_linear(self, linear: LinearRecord) -> Measurement:
        return replace(self, linears=(*self.linears, linear))

    def only(
        self, linear: Callable[[LinearRecord], bool], option: Callable[[OptionRecord], bool]
    ) -> Measurement:
        """The linears and of these the options that the predicates keep.

        Raises MeasurementError where a linear that is kept has none of the options.
        """
        kept = [(record, tuple(filter(option, record.options))) for record in self.linears if linear(record)]
        for record, options in kept:
            if not options:
                raise MeasurementError(
                    f"{record.key} has none of the options wanted; measure it again with them"
                )
        return replace(self, linears=tuple(replace(record, options=options) for record, options in kept))


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str) or not value or not value.isprintable():
        raise MeasurementError(f"{name} is {shown(value)}, not printable text")


def _check_integer(name: str, value: object, least: int) -> None:
    if type(value) is not int or not least <= value < MAX_EXACT:
        raise MeasurementError(f"{name} is {shown(value)}, not an integer from {least} to 2**53")


def _check_number(name: str, value: object) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= sys.float_info.max:  # type: ignore[operator]
        raise MeasurementError(f"{name} is {shown(value)}, not a finite number from 0")


def _check_distinct(what: str, names: Sequence[str]) -> None:
    if len(set(names)) < len(names):
        [(twice, _)] = Counter(names).most_common(1)
        raise MeasurementError(f"{what} {twice!r} is recorded twice; keep one")


def shown(value: object) -> str:
    """A value short enough for a message."""
    text = " ".join(repr(value).split())
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"
