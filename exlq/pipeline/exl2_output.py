"""The EXL2 directory as a job's output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from exlq import __version__
from exlq.errors import ConfigError, FormatError, ModelError, TargetError
from exlq.formats.codec import Codec
from exlq.formats.codecs import CODECS
from exlq.formats.exl2_config import exl2_config, require_known
from exlq.formats.exl2_directory import Exl2Weights, Exl2Writer
from exlq.formats.exl2_options import HEAD_OPTIONS
from exlq.measurement import Measurement
from exlq.models.config import read_json
from exlq.models.model import Model
from exlq.models.open import open_model
from exlq.pipeline import directory as places
from exlq.pipeline import kinds, verify
from exlq.pipeline.allocate import (
    Choice,
    measured_loss,
    recipe_options,
    recipe_output,
    records,
    solved,
    total_loss,
)
from exlq.pipeline.measured import sensitivities
from exlq.pipeline.plan import Plan
from exlq.pipeline.progress import Progress
from exlq.pipeline.quantize import quantized_linears
from exlq.pipeline.remarks import Remarks
from exlq.pipeline.rounding import Rounding
from exlq.pipeline.tensor_cache import TENSORS, TensorCache
from exlq.workspace import Workspace

EXLLAMAV2_VERSION = "0.3.2"  # whose form of the directory is written
SHARD_HEADER_BYTES = 1024  # of a shard with one tensor, at most
TRUSTED_FROM_BPW = 3.0  # below, any divergence may be what was asked for


class Exl2Output:
    """Raises InputError, when made, for what EXL2 or its reader cannot do."""

    name = "exl2"

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.codec: Codec[Any] = CODECS[self.name]
        require_known(plan.model.family.exl2_architecture or plan.model.family.architectures[0])
        self._given = recipe_output(plan, self.codec)
        self._bits = plan.config.bits if self._given is None else self._given.bpw
        self._fewest, self._most = self._range()
        self._require_reachable()
        self._require_shards()
        self._require_float16()
        self._config()
        if self._given is not None:
            self._from_recipe(None)  # refuses one of another model

    @property
    def reach(self) -> str:
        numel = self._plan.numel
        return f"{self._fewest / numel:.3f} to {self._most / numel:.3f} bits per weight"

    def trusted(self, choice: Choice) -> bool:
        enough = self._bits is not None and self._bits >= TRUSTED_FROM_BPW
        return enough and not self._plan.model.routes

    @property
    def target(self) -> Path:
        """Where the directory goes."""
        return self._plan.config.compile_full or self._plan.config.out_dir / self.name

    def require_place(self) -> None:
        places.require_replaceable(self.target)

    def allocate(self, measurement: Measurement | None) -> Choice:
        plan = self._plan
        if self._given is not None:
            return self._from_recipe(measurement)
        assert measurement is not None
        assert plan.config.bits is not None
        keys = [spec.key for spec in plan.linears]
        budget = int(plan.config.bits * plan.numel)
        allocation, options = solved(plan, self.codec, measurement, keys, budget)
        head = self.codec.head_option(plan.model.head, plan.config.head_bits)
        records(plan, self.codec, measurement, [plan.model.head.key])  # refuses a record without it
        head_loss = measured_loss(measurement, plan.model.head.key, head) or 0.0
        return Choice(
            options | {plan.model.head.key: head},
            allocation.total_bits / plan.numel,
            allocation.loss + head_loss if plan.config.objective == "kl" else None,
            allocation,
            plan.notes,
        )

    def _from_recipe(self, measurement: Measurement | None) -> Choice:
        plan = self._plan
        assert self._given is not None
        keys = [*(spec.key for spec in plan.linears), plan.model.head.key]
        options = recipe_options(plan, self.codec, self._given, keys)
        losses: list[float | None] = [None]
        if measurement is not None and plan.config.objective == "kl":
            records(plan, self.codec, measurement, keys)
            losses = [measured_loss(measurement, key, option) for key, option in options.items()]
        bits = sum(self.codec.storage_bits(spec, options[spec.key]) for spec in plan.linears)
        return Choice(options, bits / plan.numel, total_loss(losses), notes=plan.notes)

    @property
    def _head_nominal(self) -> int:
        """Bits of the head as `-hb` counts them."""
        desc = None if self._given is None else self._given.options.get(self._plan.model.head.key)
        found = (bits for bits, option in HEAD_OPTIONS.items() if option.desc == desc)
        return next(found, self._plan.config.head_bits)

    def estimated_bytes(self) -> int:
        plan = self._plan
        plain = sum(torch.Size(plan.model.weights.shape(name)).numel() for name in plan.model.plain_tensors())
        return int(((self._bits or 0) * plan.numel + self._head_bits() + 16 * plain) / 8)

    def write(self, choice: Choice, directory: Path, work: Path, progress: Progress) -> None:
        plan, model, digests = self._plan, self._plan.model, {}
        writer = Exl2Writer(directory, plan.config.shard_mib << 20 or None)
        try:
            for name in model.plain_tensors():
                writer.add_plain(name, model.weights.read(name))
            found = sensitivities(plan, work, progress) if plan.config.couples_rows else None
            rounding = Rounding(
                plan,
                self.codec,
                choice.options,
                found,
                TensorCache(work / TENSORS),
                Remarks(work, self.name).note,
            )
            for spec, tensors in quantized_linears(rounding, Workspace(work), progress):
                with plan.profile.spent(kinds.WRITING):
                    writer.add_linear(spec.key, tensors, model.linear_bias(spec.key))
                    digests[spec.key] = verify.digest(tensors)
            writer.close(self._config(), plan.config.in_dir)
        except BaseException:
            writer.abandon()
            raise
        with plan.profile.spent(kinds.WRITING):
            verify.verify_exl2(model, directory, digests)

    def opened(self, directory: Path) -> Model:
        return open_model(directory, Exl2Weights(directory), device=self._plan.model.device)

    def put_in_place(self, directory: Path) -> list[Path]:
        places.put_in_place(directory, self.target)
        return [self.target]

    def figures(self, choice: Choice) -> dict[str, Any]:
        return {"head_bits": self._head_nominal}

    def _config(self) -> dict[str, Any]:
        """config.json of the output; ModelError if ExLlamaV2 could not read it right."""
        plan, record = self._plan, self._plan.rows.record
        written = exl2_config(
            read_json(plan.config.in_dir),
            bits=self._bits or 0.0,
            head_bits=self._head_nominal,
            rows=record.rows,
            length=record.row_length,
            dataset=record.file if plan.config.calibration else "(default)",
            version=EXLLAMAV2_VERSION,
            architecture=plan.model.family.exl2_architecture or plan.model.family.architectures[0],
        )
        written["quantization_config"]["exlq"] = __version__
        if plan.config.permute_mlp:
            written["quantization_config"]["permute_mlp"] = True
        return written

    def _range(self) -> tuple[int, int]:
        """Fewest and most stored bits of the decoder's linears."""
        try:
            sizes = [
                [self.codec.storage_bits(spec, option) for option in self.codec.measured(spec, "linear")]
                for spec in self._plan.linears
            ]
        except FormatError as exc:
            raise ModelError(f"this model cannot be written as {self.name}: {exc}") from exc
        return sum(map(min, sizes)), sum(map(max, sizes))

    def _head_bits(self) -> int:
        head = self._plan.model.head
        return self.codec.storage_bits(head, self.codec.head_option(head, self._head_nominal))

    def _require_reachable(self) -> None:
        config, numel = self._plan.config, self._plan.numel
        if self._bits is None and config.output_measurement is None:
            raise TargetError(
                f"{next(iter(config.targets))} is a target of GGUF; EXL2 takes -b BITS or --recipe FILE"
            )
        low, high = self._fewest / numel, self._most / numel
        if config.bits is not None and not low <= config.bits <= high:
            raise TargetError(
                f"-b {config.bits}: this model reaches {low:.4f} to {high:.4f} bits per weight; ask for that"
            )

    def _require_shards(self) -> None:
        """Refuses shards that cannot hold the largest tensor, linears taken at their fewest bits."""
        model, shard_mib = self._plan.model, self._plan.config.shard_mib
        sizes = {name: 2 * torch.Size(model.weights.shape(name)).numel() for name in model.plain_tensors()}
        sizes[model.head.key] = self._head_bits() // 8
        for spec in self._plan.linears:
            least = self.codec.measured(spec, "linear")[0]
            sizes[spec.key] = self.codec.storage_bits(spec, least) // 8
        largest = max(sizes, key=lambda name: sizes[name])
        if shard_mib and sizes[largest] + SHARD_HEADER_BYTES > shard_mib << 20:
            raise ConfigError(
                f"-ss {shard_mib}: {largest} alone takes {sizes[largest] / (1 << 20):.2f} MiB; "
                f"give {1 + (sizes[largest] + SHARD_HEADER_BYTES) // (1 << 20)} or more"
            )

    def _require_float16(self) -> None:
        """Refuses tensors that EXL2 keeps in float16 and that do not fit into it."""
        model = self._plan.model
        names = sorted(model.weights.keys())
        biases = [name for name in names if name.endswith(".bias")]
        for name in dict.fromkeys((*model.plain_tensors(), *biases)):
            tensor = model.weights.read(name)
            if not tensor.half().isfinite().all():
                raise ModelError(
                    f"{name} has values up to {tensor.abs().max().item():.6g}, "
                    "EXL2 keeps it in float16, which ends at 65504"
                )
