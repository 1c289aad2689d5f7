"""What a person leaves to the solver: options pinned by hand, types allowed, ends given by rule."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from exlq.errors import ConfigError, MeasurementError
from exlq.formats.exl2_options import HEAD_OPTIONS
from exlq.formats.gguf.recipes import FALLBACKS
from exlq.measurement import LinearRecord, Measurement, OptionRecord
from exlq.models.layout import HEAD_KEY
from exlq.names import HEAD_BITS
from exlq.recipes.ends import gguf_ends
from exlq.recipes.sheet import Options, Sheet, formats_in


@dataclass(frozen=True)
class Pin:
    """An option for every matrix whose key the pattern is found in.

    `desc` is a GGUF type or the description of an EXL2 option; for `bits` the plain EXL2 option of so many
    bits is meant, or what `-hb` would give the head.
    """

    text: str
    pattern: re.Pattern[str]
    format: str
    desc: str | None
    bits: int | None = None


@dataclass(frozen=True)
class Wishes:
    """What is not left to the solver.

    `types` are GGUF types and EXL2 widths that the decoder's linears may have; a format of which none is
    named keeps all. Of several pins that fit, the first counts.
    """

    types: tuple[str, ...] = ()
    pins: tuple[Pin, ...] = ()
    head_bits: int = 6

    def __post_init__(self) -> None:
        if self.head_bits not in HEAD_BITS:
            raise ConfigError(f"-hb {self.head_bits}: the head takes {', '.join(map(str, HEAD_BITS))} bits")


@dataclass(frozen=True)
class Room:
    """A sheet whose options are those that `--types` allows, and the matrices that are settled."""

    sheet: Sheet
    fixed: Options

    @cached_property
    def free(self) -> tuple[LinearRecord, ...]:
        """What the solver chooses for."""
        return tuple(linear for linear in self.sheet.linears if linear.key not in self.fixed)

    @cached_property
    def settled(self) -> Sheet:
        """The sheet with one option for each matrix that is settled."""
        options = {linear.key: linear.options for linear in self.free}
        return self.sheet.with_options(options | {key: (option,) for key, option in self.fixed.items()})

    def whole(self, options: Options) -> dict[str, OptionRecord]:
        """All options in model order."""
        both = {**options, **self.fixed}
        return {linear.key: both[linear.key] for linear in self.sheet.linears}


def room_of(sheet: Sheet, wishes: Wishes, bits: float | None = None) -> Room:
    """What is left to choose in one format.

    EXL2's head follows `-hb`. With `bits`, GGUF's head and embedding follow a rule; without, they are
    chosen like all others.

    Raises:
        InputError: for a pin or type that fits nothing, or an end that was not measured.
    """
    pinned = _pinned(sheet, wishes.pins)
    fixed = {**_ends(sheet, wishes.head_bits, bits, tuple(pinned)), **pinned}
    return Room(_restricted(sheet, wishes.types, fixed), fixed)


def parse_pins(texts: Sequence[str], measurement: Measurement) -> tuple[Pin, ...]:
    """The pins of `--pin` items REGEX=OPTION.

    Raises:
        ConfigError: for an item without `=`, a pattern that is no regular expression, an unknown option.
    """
    known = {option.desc: option.format for linear in measurement.linears for option in linear.options}
    return tuple(_pin(text, known) for text in texts)


def parse_types(text: str | None, measurement: Measurement) -> tuple[str, ...]:
    """The comma list of `--types`, checked against what was measured.

    Raises:
        ConfigError: for what is neither a GGUF type nor an EXL2 width of the record.
    """
    types = tuple(part.strip().upper() for part in (text or "").split(",") if part.strip())
    known = {name for linear in measurement.linears for option in linear.options for name in _names(option)}
    if unknown := [name for name in types if name not in known]:
        wanted = ", ".join(sorted(known))
        raise ConfigError(f"--types: {unknown[0]} is not among the measured ones; want some of {wanted}")
    if text is not None and not types:
        raise ConfigError("--types lists nothing; want GGUF types as Q4_K,Q6_K or EXL2 widths as 3,4,5")
    return types


def _names(option: OptionRecord) -> set[str]:
    """What `--types` calls the option: its GGUF type, or the widths of its groups."""
    kind, bits = option.qparams.get("type"), option.qparams.get("bits")
    return {str(kind)} if bits is None else {str(width) for width in bits}


def _restricted(sheet: Sheet, types: tuple[str, ...], fixed: Options) -> Sheet:
    of_format = {name for name in types if name.isdecimal() == (sheet.format == "exl2")}
    restricted = {linear.key for linear in sheet.decoder if of_format and linear.key not in fixed}
    return sheet.with_options(
        {
            linear.key: _allowed(linear, of_format) if linear.key in restricted else linear.options
            for linear in sheet.linears
        }
    )


def _allowed(linear: LinearRecord, of_format: set[str]) -> tuple[OptionRecord, ...]:
    kept = tuple(option for option in linear.options if _names(option) <= of_format)
    if not kept:
        names = ", ".join(dict.fromkeys(name for option in linear.options for name in sorted(_names(option))))
        raise ConfigError(
            f"--types {','.join(sorted(of_format))} leaves {linear.key} nothing; it can be {names}"
        )
    return kept


def _ends(sheet: Sheet, head_bits: int, bits: float | None, pinned: tuple[str, ...]) -> Options:
    if sheet.format == "exl2":
        wanted = {HEAD_KEY: HEAD_OPTIONS[head_bits].desc}
    elif bits is None:
        wanted = {}
    else:
        wanted = gguf_ends(bits, head_bits, tied=HEAD_KEY not in sheet.by_key)
        wanted = {key: _held(sheet, key, name) for key, name in wanted.items() if key not in pinned}
    return {key: sheet.named(key, desc) for key, desc in wanted.items() if key not in pinned}


def _held(sheet: Sheet, key: str, kind: str) -> str:
    """The type, or what takes its place where rows are no whole blocks of it."""
    if key not in sheet.by_key:
        return kind
    have = {option.desc for option in sheet.by_key[key].options}
    return next((name for name in (kind, FALLBACKS.get(kind, kind), "F16") if name in have), kind)


def _pinned(sheet: Sheet, pins: tuple[Pin, ...]) -> Options:
    groups: dict[str, list[LinearRecord]] = {}
    for linear in sheet.linears:
        groups.setdefault(linear.tie or linear.key, []).append(linear)
    found: dict[str, OptionRecord] = {}
    for members in groups.values():
        for pin in pins:
            if pin.format == sheet.format and any(pin.pattern.search(linear.key) for linear in members):
                found |= {linear.key: _option(sheet, linear, pin) for linear in members}
                break
    for pin in pins:
        if pin.format == sheet.format and not any(pin.pattern.search(key) for key in sheet.by_key):
            raise ConfigError(
                f"--pin {pin.text} finds no {sheet.format} matrix; they are named as {sheet.linears[0].key}"
            )
    return found


def _option(sheet: Sheet, linear: LinearRecord, pin: Pin) -> OptionRecord:
    desc = pin.desc
    if pin.bits is not None and linear.key == HEAD_KEY and pin.bits in HEAD_OPTIONS:
        desc = HEAD_OPTIONS[pin.bits].desc
    elif pin.bits is not None:
        plain = [option for option in linear.options if list(option.qparams["bits"]) == [pin.bits]]
        desc = max((option.total_bits, option.desc) for option in plain)[1] if plain else f"{pin.bits} bits"
    try:
        return sheet.named(linear.key, desc or "")
    except MeasurementError as exc:
        raise ConfigError(f"--pin {pin.text}: {exc}") from exc


def _pin(text: str, known: dict[str, str]) -> Pin:
    pattern, equals, wanted = text.rpartition("=")
    if not (pattern and equals and wanted):
        raise ConfigError(f"--pin {text!r} is not REGEX=OPTION, as v_proj=Q6_K or v_proj=6")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # what Python's next version would read differently
            compiled = re.compile(pattern)
    except (re.error, FutureWarning, DeprecationWarning, OverflowError, RecursionError) as exc:
        raise ConfigError(f"--pin {text!r} is no regular expression: {exc}; correct it") from exc
    if wanted.isdecimal():
        return Pin(text, compiled, "exl2", None, int(wanted))
    desc = wanted if wanted in known else wanted.upper()
    if desc not in known:
        raise ConfigError(
            f"--pin {text}: {wanted!r} was not measured; want a GGUF type as Q6_K, EXL2 bits as 4 "
            "or an EXL2 option's whole description"
        )
    return Pin(text, compiled, known[desc], desc)


def formats_of(measurement: Measurement, asked: Sequence[str] | None) -> tuple[str, ...]:
    """The formats asked for, or all that were measured.

    Raises:
        ConfigError: for a format that is not in the record.
    """
    have = formats_in(measurement)
    if unknown := [name for name in asked or () if name not in have]:
        raise ConfigError(f"--format {unknown[0]}: the measurement has {', '.join(have) or 'no options'}")
    return have if asked is None else tuple(name for name in have if name in asked)
