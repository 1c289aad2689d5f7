"""The settings of one conversion, checked whole when made."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from exlq.calibration.rows import STARTS, Mode
from exlq.errors import ConfigError
from exlq.formats import CODECS
from exlq.formats.exl2_options import HEAD_BITS

QUANTIZE_TOKENS = 100 * 2048  # what -r and -l come to by default
MEASURE_TOKENS = 16 * 2048  # likewise -mr and -ml
# One row is held out; the second half of a row of 3 has one token to be predicted.
LEAST = {"rows": 2, "length": 3, "measurement_rows": 2, "measurement_length": 2, "threads": 1}
STATES = ("float32", "bf16")


@dataclass(frozen=True)
class ConvertConfig:
    """One conversion. Lengths and rows left None follow from the model (`plan`).

    Raises:
        ConfigError: when made, if settings are out of range or exclude one another.
    """

    in_dir: Path
    out_dir: Path
    calibration: Path | None = None
    bits: float | None = None
    head_bits: int = 6
    shard_mib: int = 8192
    rows: int | None = None
    length: int | None = None
    measurement_rows: int | None = None
    measurement_length: int | None = None
    measurement: Path | None = None
    output_measurement: Path | None = None
    compile_full: Path | None = None
    no_resume: bool = False
    force_measurement: bool = False
    formats: tuple[str, ...] = ("exl2",)
    text_column: str | None = None
    parse_special: bool = False
    row_mode: Mode = "spread"
    states: str = "float32"
    seed: int = 0
    threads: int | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.output_measurement is None and self.bits is None:
            raise ConfigError("no target: give -b BITS, or -om FILE to measure only")
        if self.output_measurement is not None and self.compile_full is not None:
            raise ConfigError("-om measures only and -cf wants a whole model: give one of them")
        if self.output_measurement is not None and self.measurement is not None:
            raise ConfigError("-om measures and -m takes a finished measurement: give one of them")
        if self.bits is not None and not 0 < self.bits <= 16:
            raise ConfigError(f"-b {self.bits}: bits per weight must be above 0 and at most 16")
        if self.head_bits not in HEAD_BITS:
            raise ConfigError(f"-hb {self.head_bits}: the head takes {', '.join(map(str, HEAD_BITS))} bits")
        unknown = [name for name in self.formats if name not in CODECS]
        if unknown or not self.formats:
            raise ConfigError(f"--format {','.join(self.formats)}: known formats are {', '.join(CODECS)}")
        if self.row_mode not in STARTS:
            raise ConfigError(f"--rows {self.row_mode}: choose {' or '.join(STARTS)}")
        self._check_counts()

    def _check_counts(self) -> None:
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} is {value}; at least {least} is wanted")
        if self.shard_mib < 0:
            raise ConfigError(f"-ss {self.shard_mib}: a shard size in MiB is wanted, 0 for one file")
        if self.states not in STATES:
            raise ConfigError(f"--states {self.states}: choose {' or '.join(STATES)}")

    def as_json(self) -> dict[str, Any]:
        """Every setting by name, paths as given."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
