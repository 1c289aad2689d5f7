"""The settings of one conversion, checked whole when made."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from exlq.errors import ConfigError
from exlq.names import FORMATS, HEAD_BITS, OBJECTIVES, ROW_MODES, STATES, Mode
from exlq.sizing.effort import EFFORTS, NORMAL

QUANTIZE_TOKENS = EFFORTS[NORMAL].quantize_tokens  # of what has no --effort
# One row is held out; the second half of a row of 3 has one token to be predicted.
LEAST = {"rows": 2, "length": 3, "measurement_rows": 2, "measurement_length": 2, "threads": 1}
WORKERS = re.compile(r"[1-9][0-9]{0,3}|ray|ray://[^\s/]+:[0-9]+")


@dataclass(frozen=True)
class Methods:
    """What lowers the divergence beyond plain GPTQ; each can be left out, to learn what it is worth."""

    descent: bool = True  # levels and scales improved after the sweep
    row_feedback: bool = True  # errors handed on between output rows, not only between input channels
    input_correction: bool = True  # made up for: inputs that differ from the base model's
    residual_correction: bool = True  # likewise the residual stream, by the linears that write to it


@dataclass(frozen=True)
class ConvertConfig:
    """One conversion. Lengths left None follow from the model, rows left None from `effort` (`plan`).

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
    effort: str = NORMAL  # of EFFORTS: the tokens that rows left None come to, and refinements
    measurement: Path | None = None
    output_measurement: Path | None = None
    compile_full: Path | None = None
    no_resume: bool = False
    clean: bool = False  # quantized tensors and gradients are not kept for another run
    allow_other_machine: bool = False  # a job may go on with other threads, or another device
    force_measurement: bool = False
    formats: tuple[str, ...] | None = None  # None: all that can be made
    measure: tuple[str, ...] | None = None  # formats whose options are measured; None: all
    file_size: int | None = None  # bytes of the GGUF file with all its shards
    gguf_type: str | None = None  # name of a recipe
    recipe: Path | None = None  # file of `exlq solve`: the option of every matrix
    gptq: bool = True
    weighted: bool = True
    tensor_types: tuple[str, ...] = ()  # REGEX=TYPE
    output_tensor_type: str | None = None
    token_embedding_type: str | None = None
    split_bytes: int | None = None
    tokenizer_pre: str | None = None
    gguf_template: Path | None = None
    text_column: str | None = None
    parse_special: bool = False
    row_mode: Mode = "spread"
    random_share: float = 0.25  # rows of random tokens to quantize on, for each row of text
    states: str = "float32"
    seed: int = 0
    threads: int | None = None
    device: str = "cpu"  # or several that are alike, as cuda:0,cuda:1
    workers: str | None = None  # N, ray or ray://HOST:PORT; None: this process does all
    objective: str = "kl"
    profile: bool = False  # tell where the time goes, in the summary
    permute_mlp: bool = False  # channels inside MLPs and heads put in an order that suits the blocks
    methods: Methods = field(default_factory=Methods)

    def __post_init__(self) -> None:
        self._check_target()
        if self.head_bits not in HEAD_BITS:
            raise ConfigError(f"-hb {self.head_bits}: the head takes {', '.join(map(str, HEAD_BITS))} bits")
        for flag, names in (("--format", self.formats), ("--measure", self.measure)):
            if names is not None and (not names or set(names) - set(FORMATS)):
                raise ConfigError(f"{flag} {','.join(names)}: known formats are {', '.join(FORMATS)}")
        if self.objective not in OBJECTIVES:
            raise ConfigError(f"--objective {self.objective}: choose {' or '.join(OBJECTIVES)}")
        if self.row_mode not in ROW_MODES:
            raise ConfigError(f"--rows {self.row_mode}: choose {' or '.join(ROW_MODES)}")
        if self.effort not in EFFORTS:
            raise ConfigError(f"--effort {self.effort}: choose {', '.join(EFFORTS)}")
        self._check_counts()
        self._check_machine()

    @property
    def targets(self) -> dict[str, Any]:
        """The targets given, by their flags."""
        recipe = None if self.recipe is None else self.recipe.name
        given = {
            "-b": self.bits,
            "--file-size": self.file_size,
            "--gguf-type": self.gguf_type,
            "--recipe": recipe,
        }
        return {flag: value for flag, value in given.items() if value is not None}

    @property
    def measures(self) -> bool:
        """Whether the target is to be allocated from a measurement."""
        return self.gguf_type is None and self.recipe is None

    @property
    def measured_formats(self) -> tuple[str, ...]:
        """Formats whose options are measured."""
        return tuple(name for name in FORMATS if self.measure is None or name in self.measure)

    @property
    def couples_rows(self) -> bool:
        """Whether rounding errors are handed on between output rows."""
        return self.gptq and self.methods.row_feedback and self.objective == "kl"

    @property
    def descends(self) -> bool:
        """Whether levels and scales are improved after the sweep."""
        return self.methods.descent and EFFORTS[self.effort].descent

    @property
    def corrects(self) -> bool:
        """Whether later linears make up for what earlier ones have changed."""
        return self.gptq and self.methods.input_correction

    @property
    def rounding(self) -> str:
        """How levels are chosen."""
        return "gptq" if self.gptq else "weighted" if self.weighted else "unweighted"

    def _check_target(self) -> None:
        if len(self.targets) > 1:
            raise ConfigError(f"{' and '.join(self.targets)} exclude one another: give one target")
        if self.output_measurement is None and not self.targets:
            raise ConfigError(
                "no target: give -b BITS, --file-size SIZE or --gguf-type NAME, or -om FILE to measure only, "
                "or --recipe FILE of exlq solve"
            )
        if self.output_measurement is not None and not self.measures:
            raise ConfigError(f"-om measures and {next(iter(self.targets))} wants no measurement: give one")
        if self.output_measurement is not None and self.compile_full is not None:
            raise ConfigError("-om measures only and -cf wants a whole model: give one of them")
        if self.output_measurement is not None and self.measurement is not None:
            raise ConfigError("-om measures and -m takes a finished measurement: give one of them")
        if self.bits is not None and not 0 < self.bits <= 16:
            raise ConfigError(f"-b {self.bits}: bits per weight must be above 0 and at most 16")
        if not self.weighted and (self.gptq or self.gguf_type is None):
            raise ConfigError("--unweighted measures nothing: it goes with --no-gptq and --gguf-type NAME")

    def _check_counts(self) -> None:
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} is {value}; at least {least} is wanted")
        if self.shard_mib < 0:
            raise ConfigError(f"-ss {self.shard_mib}: a shard size in MiB is wanted, 0 for one file")
        if self.split_bytes is not None and self.split_bytes < 1:
            raise ConfigError(f"--split-size {self.split_bytes}: a size of at least one byte is wanted")
        if not 0 <= self.random_share <= 1:
            raise ConfigError(f"--random-rows {self.random_share}: a share from 0 to 1 is wanted")
        if self.states not in STATES:
            raise ConfigError(f"--states {self.states}: choose {' or '.join(STATES)}")

    def _check_machine(self) -> None:
        names = self.device.split(",")
        kinds = {name.partition(":")[0] for name in names}
        if len(names) > 1 and kinds != {"cpu"} and (kinds != {"cuda"} or len(set(names)) < len(names)):
            raise ConfigError(f"--device {self.device}: several must be different cuda:N, as cuda:0,cuda:1")
        if self.workers is None:
            return
        if not WORKERS.fullmatch(self.workers):
            raise ConfigError(
                f"--workers {self.workers}: a number of processes on this machine is wanted, ray for the "
                "cluster that it has joined, or ray://HOST:PORT"
            )
        if len(names) > 1:
            raise ConfigError(f"--workers {self.workers} and --device {self.device}: give one of them")
        if kinds != {"cpu"} and (self.workers.isdigit() or kinds != {"cuda"}):
            raise ConfigError(
                f"--workers {self.workers} with --device {self.device}: processes of this machine are for "
                "its cpu, a cluster for cpu or cuda; --device cuda:0,cuda:1 takes several GPUs"
            )

    def as_json(self) -> dict[str, Any]:
        """Every setting by name, paths as given."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        values["methods"] = asdict(self.methods)
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
