"""What one format's file may be made of: a measurement's matrices with that format's options alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from exlq.errors import MeasurementError
from exlq.measurement import LinearRecord, Measurement, OptionRecord
from exlq.measurement.record import shown
from exlq.models.layout import EMBEDDING_KEY, HEAD_KEY
from exlq.names import FORMATS
from exlq.recipes.prediction import Prediction, predicted

OVERHEAD = "overhead_bytes"  # of a measurement: by format, what is beside its matrices
FLOAT16_BYTES = 2
QUANTIZED_EMBEDDING = ("gguf",)  # formats whose embedding is a choice; EXL2's stays in float16
TIES = ("gguf",)  # formats whose linears of one fused tensor are of one type

Options = Mapping[str, OptionRecord]  # by the matrix's key


@dataclass(frozen=True)
class Sheet:
    """Every matrix of one format's file with its options, in model order.

    `beside_bytes` are those of everything else, None where the measurement does not tell; EXL2's embedding,
    which stays in float16, is among them. Without `is_kl` losses are output errors and predict nothing.
    """

    format: str
    linears: tuple[LinearRecord, ...]
    beside_bytes: int | None
    corrects: bool
    is_kl: bool

    @cached_property
    def by_key(self) -> dict[str, LinearRecord]:
        return {linear.key: linear for linear in self.linears}

    @cached_property
    def decoder(self) -> tuple[LinearRecord, ...]:
        """The linears that bits per weight are counted over."""
        return tuple(linear for linear in self.linears if linear.key not in (HEAD_KEY, EMBEDDING_KEY))

    @cached_property
    def numel(self) -> int:
        """Weights of the decoder's linears."""
        return sum(linear.numel for linear in self.decoder)

    def n_bytes(self, options: Options) -> int:
        """Bytes of the file or directory; without what the measurement does not tell."""
        return sum(option.total_bits for option in options.values()) // 8 + (self.beside_bytes or 0)

    def bpw(self, options: Options) -> float:
        return sum(options[linear.key].total_bits for linear in self.decoder) / self.numel

    def loss(self, options: Options) -> float:
        return math.fsum(option.loss for option in options.values())

    def predict(self, loss: float) -> Prediction | None:
        return predicted(loss if self.is_kl else None, self.corrects)

    def require_bytes(self, flag: str) -> int:
        """`beside_bytes`; MeasurementError where they are not known."""
        if self.beside_bytes is None:
            raise MeasurementError(
                f"{flag}: the measurement lacks {OVERHEAD} of {self.format}, it is of an older exlq; "
                "measure again, or give -b BITS"
            )
        return self.beside_bytes

    def named(self, key: str, desc: str) -> OptionRecord:
        """The option of a matrix; MeasurementError where it has none of that name."""
        if key not in self.by_key:
            raise MeasurementError(f"the measurement has no {self.format} options of {shown(key)}")
        found = [option for option in self.by_key[key].options if option.desc == desc]
        if not found:
            names = ", ".join(option.desc for option in self.by_key[key].options)
            raise MeasurementError(f"{key} has no option {shown(desc)} in {self.format}; it has {names}")
        return found[0]

    def with_options(self, allowed: Mapping[str, tuple[OptionRecord, ...]]) -> Sheet:
        """The same matrices, each with those of its options that are allowed."""
        linears = tuple(replace(linear, options=allowed[linear.key]) for linear in self.linears)
        return replace(self, linears=linears)


def sheet_of(measurement: Measurement, format: str) -> Sheet:
    """The sheet of one format.

    Raises:
        MeasurementError: if the record holds nothing of that format, or lacks some of the decoder's linears.
    """
    own = measurement.only(
        lambda linear: (
            any(option.format == format for option in linear.options)
            and (linear.key != EMBEDDING_KEY or format in QUANTIZED_EMBEDDING)
        ),
        lambda option: option.format == format,
    )
    have = {linear.key for linear in own.linears}
    decoder = {linear.key for linear in measurement.linears} - {HEAD_KEY, EMBEDDING_KEY}
    if lacking := sorted(decoder - have) if have else [format]:
        raise MeasurementError(
            f"the measurement has no {format} options of {lacking[0] if have else 'anything'}; "
            "measure again without --measure"
        )
    if not decoder:
        raise MeasurementError("the measurement holds none of the decoder's linears; measure again")
    linears = own.linears if format in TIES else tuple(replace(linear, tie=None) for linear in own.linears)
    settings = measurement.settings
    return Sheet(
        format=format,
        linears=linears,
        beside_bytes=_beside(measurement, format),
        corrects=settings.get("rounding", "gptq") == "gptq",
        is_kl=settings.get("objective", "kl") == "kl",
    )


def formats_in(measurement: Measurement) -> tuple[str, ...]:
    """The formats that the record has options of."""
    found = {option.format for linear in measurement.linears for option in linear.options}
    return tuple(name for name in FORMATS if name in found)


def block_of(key: str) -> int | None:
    """The index of the decoder block a matrix belongs to, None for head and embedding."""
    parts = key.split(".")
    return int(parts[2]) if len(parts) > 2 and parts[1] == "layers" and parts[2].isdecimal() else None


def _beside(measurement: Measurement, format: str) -> int | None:
    overheads: Any = measurement.extra.get(OVERHEAD, {})
    found = overheads.get(format) if isinstance(overheads, dict) else overheads
    if found is None:
        return None
    if type(found) is not int or not 0 <= found < 1 << 53:
        raise MeasurementError(f"{OVERHEAD} of {format} is {shown(found)}, not bytes from 0; measure again")
    return found + (FLOAT16_BYTES * _embedding_numel(measurement) if format == "exl2" else 0)


def _embedding_numel(measurement: Measurement) -> int:
    """Weights of the embedding, which has the head's shape."""
    sizes = {linear.key: linear.numel for linear in measurement.linears}
    return sizes.get(EMBEDDING_KEY) or sizes.get(HEAD_KEY, 0)
