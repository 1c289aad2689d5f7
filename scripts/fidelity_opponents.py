"""What others make of the same model and calibration: stock llama.cpp, and ExLlamaV2's plain recipe."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from torch import Tensor

from exlq.evaluation.llamacpp import quantize_chunk
from exlq.formats.exl2 import storage_bits
from exlq.formats.exl2_options import HEAD_OPTIONS, groups_of
from exlq.formats.gguf.reader import GgufFile
from exlq.formats.gguf.recipes import recipe_named, recipe_types
from exlq.formats.gguf.values import TensorInfo
from exlq.formats.gguf.writer import GgufWriter
from exlq.formats.gguf_blocks import TYPES
from exlq.pipeline.gguf_description import described
from exlq.pipeline.imatrix import importance_matrix
from exlq.pipeline.plan import Plan
from exlq.pipeline.progress import silent
from exlq.types import Option
from exlq.workspace import Workspace
from scripts import exllamav2_style
from scripts.exllamav2_measure import Way
from scripts.exllamav2_options import HEAD
from scripts.fidelity_bench import Bench, Made

NOT_COLLECTED = ("token_embd.weight", "output.weight")  # by llama-imatrix, unless asked
HEADER_BITS = 1024  # by which the tables of contents of two files may differ


@dataclass(frozen=True)
class Stock:
    """llama-quantize with an importance matrix of the rows that ours is calibrated on."""

    bench: Bench

    @cached_property
    def importance(self) -> Mapping[str, Tensor]:
        return collected(self.bench.plan, self.bench.scratch)

    def made(self, recipe: str) -> Made:
        bench, path = self.bench, self.bench.scratch / f"stock-{recipe}.gguf"
        importance, begin = self.importance, time.perf_counter()
        stock_file(bench.base, path, recipe, bench.plan, importance)
        size = path.stat().st_size
        weights = bench.weights("gguf")
        return Made(path, size, 8 * size / weights, weights, time.perf_counter() - begin)


@dataclass(frozen=True)
class ExLlamaV2Style:
    """The annealer's choice within a budget, measured and rounded on the rows ours is."""

    bench: Bench
    seconds: dict[str, float] = field(default_factory=dict)

    @cached_property
    def modules(self) -> list[list[Way]]:
        begin = time.perf_counter()
        found = exllamav2_style.measure(self.bench.plan, Workspace(self.bench.scratch))
        self.seconds["measuring"] = time.perf_counter() - begin
        return found

    def made(self, bits: float) -> Made:
        bench, directory = self.bench, self.bench.scratch / "exllamav2-style"
        modules, begin = self.modules, time.perf_counter()
        chosen = exllamav2_style.allocate(modules, int(bits * bench.plan.numel), bench.config.seed)
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        exllamav2_style.convert(bench.plan, chosen, directory, Workspace(bench.scratch))
        size = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
        bpw = sum(way.bits for way in chosen) / bench.plan.numel
        return Made(directory, size, bpw, bench.plan.numel, time.perf_counter() - begin)

    def bits_of_ours(self, target: float, theirs: Made) -> float:
        """Theirs, or fewer bits per weight where our file would be larger, the heads having other groups."""
        plan = self.bench.plan
        more = _head_bits(plan, HEAD_OPTIONS[plan.config.head_bits]) - _head_bits(plan, HEAD)
        return min(target, theirs.bpw - (more + HEADER_BITS) / plan.numel)


def collected(plan: Plan, scratch: Path) -> Mapping[str, Tensor]:
    """(in_features,) importance by tensor, of those llama-imatrix collects."""
    ids = plan.rows.ids[~plan.rows.heldout]
    entries = described(plan).entries
    found = importance_matrix(plan.model, entries, ids, "", Workspace(scratch), silent)
    return {
        name: importance
        for name in found.entries
        if name not in NOT_COLLECTED and (importance := found.importance(name)) is not None
    }


def stock_file(base: Path, path: Path, recipe: str, plan: Plan, importance: Mapping[str, Tensor]) -> Path:
    """What llama-quantize makes of the base file with that importance matrix."""
    with GgufFile(base) as file:
        types = recipe_types(
            recipe_named(recipe), list(file.tensors.values()), described(plan).shape, imatrix=True
        )
        infos = [TensorInfo(name, info.shape, types[name]) for name, info in file.tensors.items()]
        metadata = [entry for entry in file.metadata.values() if not entry.key.startswith("exlq.")]
        writer = GgufWriter(path, metadata, infos)
        for info in infos:
            data = file.read(info.name)
            if info.type != "F32":
                weight = TYPES["F32"].unpack(data)
                data = quantize_chunk(info.type, weight, importance.get(info.name))
            writer.add(info.name, data)
        writer.close()
    return path


def _head_bits(plan: Plan, option: Option) -> int:
    head = plan.model.head
    return storage_bits(groups_of(option.qparams, head.in_features), head.out_features)
