"""Everything that can be known, and refused, before a block is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from exlq.calibration import TokenRows, cut_rows, load_tokenizer, read_stream, row_length
from exlq.checkpoint import file_hashes, open_checkpoint, tokenizer_hash
from exlq.default_calibration import default_calibration
from exlq.errors import ConfigError, FormatError, ModelError, TargetError
from exlq.evaluate.run import usable_device
from exlq.formats import CODECS
from exlq.formats.codec import Codec
from exlq.formats.exl2_config import require_known
from exlq.models import Model, open_model
from exlq.pipeline.config import MEASURE_TOKENS, QUANTIZE_TOKENS, ConvertConfig
from exlq.types import LinearSpec

SHARD_HEADER_BYTES = 1024  # of a shard with one tensor, at most


@dataclass(frozen=True)
class Plan:
    """An open model, its token rows and its settings: what all stages work from."""

    config: ConvertConfig
    model: Model
    rows: TokenRows
    measurement_rows: TokenRows
    codec: Codec[Any]
    origin: Mapping[str, Any]  # model, calibration, settings: what a measurement is taken of

    @property
    def linears(self) -> tuple[LinearSpec, ...]:
        """The decoder's linears in model order: what the bits are counted over."""
        blocks = range(self.model.n_blocks)
        return tuple(linear.spec for index in blocks for linear in self.model.linears(index))

    @property
    def numel(self) -> int:
        return sum(spec.numel for spec in self.linears)

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
    """Opens and checks everything; nothing is written.

    Raises:
        InputError: of the kind that fits, for anything that cannot work.
    """
    device = usable_device(config.device)
    model = open_model(config.in_dir, open_checkpoint(config.in_dir), device=device)
    codec = CODECS[config.formats[0]]
    _require_exl2(model)
    tokenizer = load_tokenizer(config.in_dir)
    tokenizer_sha256 = tokenizer_hash(config.in_dir)
    path = config.calibration or default_calibration()
    stream = read_stream(path, tokenizer, config.text_column, config.parse_special)
    lengths = _lengths(config, model)

    def cut(rows: int | None, length: int, tokens: int) -> TokenRows:
        wanted = rows if rows is not None else max(8, tokens // length)
        return cut_rows(stream, wanted, length, tokenizer_sha256, config.seed, config.row_mode)

    rows = cut(config.rows, lengths[0], QUANTIZE_TOKENS)
    measurement_rows = cut(config.measurement_rows, lengths[1], MEASURE_TOKENS)
    _require_vocabulary(model, rows, measurement_rows)
    origin = _origin(config, model, measurement_rows, tokenizer_sha256)
    plan = Plan(config, model, rows, measurement_rows, codec, origin)
    _require_reachable(plan)
    _require_shards(plan)
    _require_float16(model)
    return plan


def reachable_bits(plan: Plan) -> tuple[int, int]:
    """Fewest and most stored bits of the decoder's linears."""
    ranges = [_range(plan.codec, spec) for spec in plan.linears]
    return sum(low for low, _ in ranges), sum(high for _, high in ranges)


def budget_bits(plan: Plan, bits: float) -> int:
    """The stored bits that `bits` a weight allow."""
    return int(bits * plan.numel)


def _range(codec: Codec[Any], spec: LinearSpec) -> tuple[int, int]:
    try:
        sizes = [codec.storage_bits(spec, option) for option in codec.options(spec)]
    except FormatError as exc:
        raise ModelError(f"this model cannot be written as {codec.name}: {exc}") from exc
    return min(sizes), max(sizes)


def _require_reachable(plan: Plan) -> None:
    low, high = (bits / plan.numel for bits in reachable_bits(plan))
    wanted = plan.config.bits
    if wanted is not None and not low <= wanted <= high:
        raise TargetError(
            f"-b {wanted}: this model reaches {low:.4f} to {high:.4f} bits per weight; ask for that"
        )


def _require_shards(plan: Plan) -> None:
    """Refuses shards that cannot hold the largest tensor, linears taken at their fewest bits."""
    model, shard_bytes = plan.model, plan.config.shard_mib << 20
    head = plan.codec.storage_bits(model.head, plan.codec.head_option(plan.config.head_bits)) // 8
    sizes = {name: 2 * torch.Size(model.weights.shape(name)).numel() for name in model.plain_tensors()}
    sizes |= {model.head.key: head} | {spec.key: _range(plan.codec, spec)[0] // 8 for spec in plan.linears}
    largest = max(sizes, key=lambda name: sizes[name])
    if shard_bytes and sizes[largest] + SHARD_HEADER_BYTES > shard_bytes:
        raise ConfigError(
            f"-ss {plan.config.shard_mib}: {largest} alone takes {sizes[largest] / (1 << 20):.2f} MiB; "
            f"give {1 + (sizes[largest] + SHARD_HEADER_BYTES) // (1 << 20)} or more"
        )


def _require_float16(model: Model) -> None:
    """Refuses tensors that EXL2 keeps in float16 and that do not fit into it."""
    for name in model.plain_tensors():
        tensor = model.weights.read(name)
        if not tensor.half().isfinite().all():
            raise ModelError(
                f"{name} has values up to {tensor.abs().max().item():.6g}, "
                "EXL2 keeps it in float16, which ends at 65504"
            )


def _require_exl2(model: Model) -> None:
    require_known(model.family.exl2_architecture or model.family.architectures[0])


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
    return {
        "model": {
            "architecture": model.family.architectures[0],
            "sha256": file_hashes(config.in_dir),
            "tokenizer_sha256": tokenizer_sha256,
        },
        "calibration": asdict(rows.record),
        "settings": {"states": config.states, "seed": config.seed},
    }
