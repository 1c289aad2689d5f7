"""The GGUF file as a job's output."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exlq.errors import FormatError, TargetError
from exlq.formats.codec import Codec
from exlq.formats.codecs import CODECS
from exlq.formats.gguf.naming import file_name
from exlq.formats.gguf.overrides import parse_overrides, type_file
from exlq.formats.gguf.reader import GgufFile
from exlq.formats.gguf.recipes import nearest_file_type, recipe_named, tensor_bytes
from exlq.formats.gguf.tensors import Entry, shifted, to_file
from exlq.formats.gguf.values import KeyValue, TensorInfo
from exlq.formats.gguf.weights import GgufWeights
from exlq.formats.gguf.writer import GgufWriter, file_bytes
from exlq.formats.gguf_blocks import FLOAT_TYPES
from exlq.formats.gguf_codec import plainly_rounded
from exlq.measurement import Measurement
from exlq.models.model import Model
from exlq.models.open import open_model
from exlq.pipeline import directory as places
from exlq.pipeline import kinds, verify
from exlq.pipeline.allocate import Choice, recipe_output
from exlq.pipeline.embedding import quantized_embedding
from exlq.pipeline.gguf_choice import (
    Matrices,
    bits_range,
    by_recipe,
    by_solved_recipe,
    require_size,
    smallest,
    within_bits,
    within_bytes,
)
from exlq.pipeline.gguf_description import described, whole_metadata
from exlq.pipeline.measured import sensitivities
from exlq.pipeline.plan import Plan
from exlq.pipeline.progress import Progress
from exlq.pipeline.quantize import quantized_linears
from exlq.pipeline.remarks import Remarks
from exlq.pipeline.rounding import Rounding, Stored
from exlq.pipeline.sensitivity import Sensitivity
from exlq.pipeline.tensor_cache import TENSORS, Kept, TensorCache, matrix_alone
from exlq.types import LinearSpec, Option
from exlq.workspace import Workspace

TRUSTED_FROM_BPW = 3.0  # below, any divergence may be what was asked for
UNMEASURED_FROM_BPW = 6.0  # likewise where no divergence was predicted
GIB, MIB = 1 << 30, 1 << 20


class GgufOutput:
    """Raises InputError, when made, for what llama.cpp or the target does not allow."""

    name = "gguf"

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.codec: Codec[Any] = CODECS[self.name]
        config = plan.config
        self._told = described(plan)
        overrides = parse_overrides(
            config.tensor_types, config.output_tensor_type, config.token_embedding_type
        )
        self._matrices = Matrices(plan, self.codec, self._told.entries, overrides)
        self._recipe = None if config.gguf_type is None else recipe_named(config.gguf_type)
        self._given = recipe_output(plan, self.codec)
        if self._given is not None:
            by_solved_recipe(self._matrices, None, self._given)  # refuses one of another model
        self._low, self._high = bits_range(self._matrices)
        self._require_reachable()

    @property
    def reach(self) -> str:
        return f"{self._low:.3f} to {self._high:.3f} bits per weight"

    def trusted(self, choice: Choice) -> bool:
        least = TRUSTED_FROM_BPW if choice.loss is not None else UNMEASURED_FROM_BPW
        return choice.bpw >= least and not self._plan.model.routes

    @property
    def target(self) -> Path:
        """The directory of the finished files."""
        return self._plan.config.out_dir / self.name

    def require_place(self) -> None:
        places.require_directory(self.target)

    def allocate(self, measurement: Measurement | None) -> Choice:
        choice = self._chosen(measurement)
        return replace(choice, notes=choice.notes + self._told.notes + self._plan.notes)

    def _chosen(self, measurement: Measurement | None) -> Choice:
        config = self._plan.config
        if self._recipe is not None:
            return by_recipe(self._matrices, measurement, self._recipe, self._told.shape, config.weighted)
        if self._given is not None:
            return by_solved_recipe(self._matrices, measurement, self._given)
        assert measurement is not None
        if config.bits is not None:
            return within_bits(self._matrices, measurement, config.bits)
        assert config.file_size is not None
        return within_bytes(self._matrices, measurement, config.file_size, self._most_bytes)

    def estimated_bytes(self) -> int:
        config, model = self._plan.config, self._plan.model
        if config.file_size is not None:
            return config.file_size
        if self._given is not None:
            return self._given.bytes
        ends = sum(self._plan.specs[key].numel for key in (model.head.key, model.embedding_key))
        return int((config.bits or self._high) * (self._plan.numel + ends) / 8)

    def types(self, choice: Choice) -> dict[str, str]:
        """The type of every tensor of the file, in its order."""
        return self._types(choice.options)

    def write(self, choice: Choice, directory: Path, work: Path, progress: Progress) -> None:
        types, metadata = self.types(choice), self._metadata(choice)
        path = directory / self._file_name(choice, metadata)
        infos = [TensorInfo(entry.name, entry.shape, types[entry.name]) for entry in self._told.entries]
        writer = GgufWriter(path, metadata, infos, self._plan.config.split_bytes)
        digests = {}
        try:
            for name, data in self._data(choice, work, progress):
                with self._plan.profile.spent(kinds.WRITING):
                    writer.add(name, data)
                    digests[name] = hashlib.sha256(data.numpy().tobytes()).hexdigest()
            paths = writer.close()
        except BaseException:
            writer.abandon()
            raise
        with self._plan.profile.spent(kinds.WRITING):
            verify.verify_gguf(paths, types, digests)
        listed = path.with_suffix(".types.txt")
        listed.write_text(type_file(types), encoding="utf-8", newline="\n")
        verify.verify_types(listed, type_file(types))

    def opened(self, directory: Path) -> Model:
        file = GgufFile(min(directory.glob("*.gguf")))
        weights = GgufWeights(file, self._told.entries)
        return open_model(self._plan.config.in_dir, weights, device=self._plan.model.device)

    def put_in_place(self, directory: Path) -> list[Path]:
        return places.put_files_in_place(directory, self.target)

    def figures(self, choice: Choice) -> dict[str, Any]:
        total = self._file_bytes(choice)
        numel = sum(spec.numel for key, spec in self._plan.specs.items() if key in choice.options)
        types = self.types(choice)
        sizes = {entry.name: tensor_bytes(types[entry.name], entry.shape) for entry in self._told.entries}
        return {
            "file_bytes": total,
            "file_bpw": 8 * total / numel,
            "types": types,
            "tensor_bytes": sizes,
        }

    def overhead_bytes(self) -> int:
        """Bytes of a file beside its matrices, but for what the text of the target takes."""
        options = smallest(self._matrices)
        return self._most_bytes(options) - self._matrices.bits(options) // 8

    def _types(self, options: Mapping[str, Option]) -> dict[str, str]:
        keys = self._matrices.keys
        chosen = {keys[key]: option.qparams["type"] for key, option in options.items()}
        return {entry.name: chosen.get(entry.name, "F32") for entry in self._told.entries}

    def _data(self, choice: Choice, work: Path, progress: Progress) -> Iterator[tuple[str, Tensor]]:
        """Every tensor's bytes, in the order of the file."""
        made = self._matrices_made(choice, work, progress)
        waiting: dict[str, Tensor] = {}
        for entry in self._told.entries:
            if not entry.matrix:
                yield entry.name, self._floats(entry)
                continue
            while not all(source in waiting for source in entry.sources):
                spec, tensors = next(made)
                waiting[f"{spec.key}.weight"] = tensors["blocks"]
            rows = torch.cat([waiting.pop(source) for source in entry.sources])
            yield entry.name, to_file(entry, rows)
        for _ in made:
            raise AssertionError("every linear has its place in the file")

    def _matrices_made(self, choice: Choice, work: Path, progress: Progress) -> Iterator[Stored]:
        """Embedding, linears and head, in the order of the file."""
        plan, cache = self._plan, TensorCache(work / TENSORS)
        if self._uncalibrated:
            head = () if plan.model.tied else (plan.model.head,)
            for spec in (plan.model.embedding, *plan.linears, *head):
                yield spec, self._plain(spec, choice.options[spec.key], cache)
            return
        found = sensitivities(plan, work, progress)
        tensors, restored = self._embedding(choice, cache, found)
        yield plan.model.embedding, tensors
        coupled = found if plan.config.couples_rows else None
        rounding = Rounding(plan, self.codec, choice.options, coupled, cache, Remarks(work, self.name).note)
        yield from quantized_linears(rounding, Workspace(work), progress, restored)

    def _plain(self, spec: LinearSpec, option: Option, cache: TensorCache) -> Mapping[str, Tensor]:
        name = matrix_alone(self._plan, self.name, spec, option)
        kept = cache.read(name)
        if kept is None:
            weight = self._plan.model.linear_weight(spec.key)
            kept = Kept(plainly_rounded(spec, option, weight, None))
            cache.write(name, kept)
        return kept.tensors

    def _embedding(
        self, choice: Choice, cache: TensorCache, found: Sensitivity
    ) -> tuple[Mapping[str, Tensor], Tensor]:
        """The embedding's stored tensors, and the (vocab, hidden) float32 that they give back."""
        spec = self._plan.model.embedding
        option = choice.options[spec.key]
        name = matrix_alone(self._plan, self.name, spec, option)
        kept = cache.read(name)
        if kept is not None:
            return kept.tensors, self.codec.unpack(kept.tensors, spec, option)
        tensors, restored = quantized_embedding(self._plan, self.codec, option, found)
        cache.write(name, Kept(tensors))
        return tensors, restored

    @property
    def _uncalibrated(self) -> bool:
        """Whether no text is needed: nothing is weighted, or nothing is rounded but to floats."""
        return not self._plan.config.weighted or (self._recipe is not None and self._recipe.is_float)

    def _floats(self, entry: Entry) -> Tensor:
        if entry.value is not None:
            values = entry.value
        else:
            sources = [self._plan.model.weights.read(source).float() for source in entry.sources]
            values = shifted(entry, to_file(entry, torch.cat(sources)))
        try:
            return FLOAT_TYPES["F32"].pack(values)
        except FormatError as exc:
            raise FormatError(f"{entry.name}: {exc}") from exc

    def _most_bytes(self, options: Mapping[str, Option]) -> int:
        """Of all shards, with all that metadata may tell."""
        return self._file_bytes(Choice(options, 0.0, 0.0))

    def _file_bytes(self, choice: Choice) -> int:
        """Of all shards, exactly: metadata takes the same whatever the figures in it."""
        types = self._types(choice.options)
        infos = [TensorInfo(entry.name, entry.shape, types[entry.name]) for entry in self._told.entries]
        return file_bytes(self._metadata(choice), infos, self._plan.config.split_bytes)

    def _metadata(self, choice: Choice) -> list[KeyValue]:
        return whole_metadata(self._plan, self._told, choice, self._file_type(choice))

    def _file_type(self, choice: Choice) -> int:
        if self._recipe is not None:
            return self._recipe.file_type
        types, sizes = self._types(choice.options), Counter[str]()
        for entry in self._told.entries:
            kind = types[entry.name]
            sizes[kind] += tensor_bytes(kind, entry.shape) if entry.matrix else 0
        return int(nearest_file_type(sizes))

    def _file_name(self, choice: Choice, metadata: list[KeyValue]) -> str:
        config = self._plan.config
        if self._recipe is not None:
            return file_name(metadata, self._recipe.name)
        if config.bits is not None or self._given is not None:
            return file_name(metadata, f"{config.bits or choice.bpw:.2f}bpw")
        size = config.file_size or 0
        return file_name(metadata, f"{size / GIB:.2f}GiB" if size >= GIB / 10 else f"{size / MIB:.2f}MiB")

    def _require_reachable(self) -> None:
        bits, size = self._plan.config.bits, self._plan.config.file_size
        if size is not None:
            require_size(size, self._most_bytes(smallest(self._matrices)))
        if bits is not None and not self._low <= bits <= self._high:
            raise TargetError(
                f"-b {bits}: as GGUF this model reaches {self._low:.4f} to {self._high:.4f} bits per weight"
            )
