"""Everything that can be known, and refused, before a block is read."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from exlq.calibration import TokenRows, cut_rows, load_tokenizer, random_rows, read_stream, row_length
from exlq.checkpoint.hashes import file_hashes, tokenizer_hash
from exlq.checkpoint.open import open_checkpoint
from exlq.default_calibration import default_calibration
from exlq.errors import ConfigError, FormatError, ModelError
from exlq.formats.codec import Codec, Role
from exlq.formats.codecs import CODECS
from exlq.models.model import Model
from exlq.models.open import open_model
from exlq.numerics.hessian import PLENTY, shrinkage
from exlq.pipeline.config import ConvertConfig
from exlq.pipeline.profile import NO_PROFILE, Profile, Recorder
from exlq.pipeline.workers import IN_PROCESS, Workers, chosen, usable_devices
from exlq.sizing.effort import EFFORTS, rows_of
from exlq.types import LinearSpec, Option

PERMUTED = "channels inside MLPs and attention heads are permuted: adapters trained on the base do not fit"


@dataclass(frozen=True)
class Plan:
    """An open model, its token rows and its settings: what all stages work from."""

    config: ConvertConfig
    model: Model
    rows: TokenRows
    measurement_rows: TokenRows
    codecs: tuple[Codec[Any], ...]  # of the formats whose options are measured
    origin: Mapping[str, Any]  # model, calibration, settings: what a measurement is taken of
    random_ids: Tensor  # (n, length) int64 rows of random tokens, quantized on beside the text's
    profile: Profile = NO_PROFILE  # told where time goes
    workers: Workers = IN_PROCESS

    @property
    def quantized_on(self) -> Tensor:
        """(n, length) int64: the text rows that are not held out, then the random ones."""
        return torch.cat([self.rows.ids[~self.rows.heldout], self.random_ids])

    @cached_property
    def linears(self) -> tuple[LinearSpec, ...]:
        """The decoder's linears in model order: what the bits are counted over."""
        blocks = range(self.model.n_blocks)
        return tuple(linear.spec for index in blocks for linear in self.model.linears(index))

    @cached_property
    def specs(self) -> Mapping[str, LinearSpec]:
        """Every matrix of the measurement by its key: the decoder's linears, lm_head, the embedding."""
        ends = (self.model.head, self.model.embedding)
        return {spec.key: spec for spec in (*self.linears, *ends)}

    @property
    def numel(self) -> int:
        return sum(spec.numel for spec in self.linears)

    @property
    def notes(self) -> tuple[str, ...]:
        """What whoever uses the result must know of the model's weights, whatever the format."""
        return (*((PERMUTED,) if self.config.permute_mlp else ()), *self._few_tokens())

    def _few_tokens(self) -> tuple[str, ...]:
        """A line where Hessians are shrunk: their linears have too few tokens to be taken as they are."""
        tokens = self.quantized_on.numel() if self.config.gptq and self.config.weighted else None
        if tokens is None:
            return ()
        shares = (shrinkage(int(tokens * self.model.share(s)), s.in_features) for s in self.linears)
        if not (few := [share for share in shares if share]):
            return ()
        most = 100 * max(few)
        return (
            f"{len(few)} linears have fewer than {PLENTY} of the {tokens:,} tokens per input channel: their "
            f"Hessians were shrunk towards the diagonal, by {most:.0f} % at most; more rows (-r) do better",
        )

    def tried(self, spec: LinearSpec) -> list[tuple[Codec[Any], tuple[Option, ...]]]:
        """The options of a matrix that are to be measured, by codec; its shape may admit none of a codec."""
        found = []
        for codec in self.codecs:
            with suppress(FormatError):
                if options := codec.measured(spec, self.role(spec)):
                    found.append((codec, options))
        return found

    def role(self, spec: LinearSpec) -> Role:
        if spec.key == self.model.head.key:
            return "tied head" if self.model.tied else "head"
        return "embedding" if spec.key == self.model.embedding_key else "linear"

    def checked_rows(self) -> tuple[Tensor, str]:
        """(n, length) int64 rows outside the Hessians of both passes, and what they are, in words.

        A text so short that every row held out of the quantization overlaps one measured on leaves
        only the former to check on; the words then say so.
        """
        heldout = self.rows.ids[self.rows.heldout]
        starts = self.rows.starts[self.rows.heldout]
        seen = self.measurement_rows.starts[~self.measurement_rows.heldout]
        length, other = self.rows.ids.shape[1], self.measurement_rows.ids.shape[1]
        clash = (starts.unsqueeze(1) < seen + other) & (seen < starts.unsqueeze(1) + length)
        clean = ~clash.any(1)
        if clean.any():
            return heldout[clean], "rows held out of both passes"
        return heldout, "rows held out of the quantization, which overlap text measured on"


def make_plan(config: ConvertConfig) -> Plan:
    """Opens and checks what all formats need; nothing is written.

    Raises:
        InputError: of the kind that fits, for anything that cannot work.
    """
    devices = usable_devices(config)
    workers = chosen(config, devices)
    if config.profile and workers is not IN_PROCESS:
        raise ConfigError("--profile sees one process on one device: leave out --workers and further devices")
    profile = Recorder(devices[0]) if config.profile else NO_PROFILE
    checkpoint = open_checkpoint(config.in_dir)
    model = open_model(config.in_dir, checkpoint, device=devices[0], permute_mlp=config.permute_mlp)
    tokenizer = load_tokenizer(config.in_dir)
    tokenizer_sha256 = tokenizer_hash(config.in_dir)
    path = config.calibration or default_calibration()
    stream = read_stream(path, tokenizer, config.text_column, config.parse_special)
    lengths = _lengths(config, model)

    def cut(rows: int | None, length: int, tokens: int) -> TokenRows:
        wanted = rows if rows is not None else rows_of(tokens, length)
        return cut_rows(stream, wanted, length, tokenizer_sha256, config.seed, config.row_mode)

    effort = EFFORTS[config.effort]
    rows = cut(config.rows, lengths[0], effort.quantize_tokens)
    measurement_rows = cut(config.measurement_rows, lengths[1], effort.measure_tokens)
    _require_vocabulary(model, rows, measurement_rows)
    origin = _origin(config, model, measurement_rows, tokenizer_sha256)
    codecs = tuple(CODECS[name] for name in config.measured_formats)
    noise = random_rows(tokenizer, rows, config.random_share, model.vocab_size, config.seed)
    plan = Plan(config, model, rows, measurement_rows, codecs, origin, noise, profile, workers)
    if config.measures:
        _require_measurable(plan)
    return plan


def _require_measurable(plan: Plan) -> None:
    """Refuses a matrix that no format whose options are to be measured can hold."""
    for spec in (*plan.linears, plan.model.head):
        if not plan.tried(spec) and plan.role(spec) != "tied head":
            try:
                plan.codecs[0].measured(spec, plan.role(spec))
            except FormatError as exc:
                raise ModelError(f"this model cannot be written as {plan.codecs[0].name}: {exc}") from exc


def _require_vocabulary(model: Model, *rows: TokenRows) -> None:
    largest = max(int(some.ids.max()) for some in rows)
    if largest >= model.vocab_size:
        raise ModelError(
            f"the tokenizer gives token {largest}, the model has {model.vocab_size}: "
            "give the tokenizer that belongs to the model"
        )


def _lengths(config: ConvertConfig, model: Model) -> tuple[int, int]:
    """Row lengths of the quantization and of the measurement."""
    return (
        row_length(config.length, model.max_length),
        row_length(config.measurement_length, model.max_length),
    )


def _origin(config: ConvertConfig, model: Model, rows: TokenRows, tokenizer_sha256: str) -> Mapping[str, Any]:
    settings = {"states": config.states, "seed": config.seed, "rounding": config.rounding}
    return {
        "model": {
            "architecture": model.family.architectures[0],
            "sha256": file_hashes(config.in_dir),
            "tokenizer_sha256": tokenizer_sha256,
        },
        "calibration": asdict(rows.record),
        "settings": settings
        | ({"permute_mlp": True} if config.permute_mlp else {})
        | ({"objective": config.objective} if config.objective != "kl" else {}),
    }
