"""What tests of whole conversions share."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from exlq import measurement
from exlq.measurement import LinearRecord, Measurement, OptionRecord
from exlq.models.model import Model
from exlq.pipeline import job
from exlq.pipeline.config import ConvertConfig
from exlq.pipeline.plan import Plan, make_plan
from exlq.pipeline.progress import Progress, silent
from exlq.types import LinearSpec

SMALL: dict[str, Any] = {"rows": 24, "length": 64, "measurement_rows": 24, "measurement_length": 64}
SMALL_FLAGS = ["-r", "24", "-l", "64", "-mr", "24", "-ml", "64"]
SUFFIXES = ("q_weight", "q_scale", "q_scale_max", "q_groups", "q_invperm")


def write_ids(path: Path, seed: int = 0, high: int = 260, rare: tuple[int, int] | None = None) -> Path:
    """16384 random tokens of the tiny models' tokenizer below `high`; `rare` is a place and its token."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, high, (64, 256), generator=generator)
    if rare:
        ids.view(-1)[rare[0]] = rare[1]
    pq.write_table(pa.table({"input_ids": ids.tolist()}), path)
    return path


def write_texts(path: Path, texts: list[str]) -> Path:
    pq.write_table(pa.table({"text": texts}), path)
    return path


def settings(in_dir: Path, out_dir: Path, calibration: Path, **changes: Any) -> ConvertConfig:
    """EXL2 at 6 bits per weight, unless what is changed says otherwise."""
    wanted = {"bits": 6.0, "formats": ("exl2",), "measure": ("exl2",), **SMALL, **changes}
    return ConvertConfig(in_dir=in_dir, out_dir=out_dir, calibration=calibration, **wanted)


def convert(config: ConvertConfig, progress: Progress = silent) -> dict[str, Any]:
    """A whole conversion; its summary, empty where only a measurement was asked for."""
    return job.run(job.begin(config, progress, "a command")) or {}


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, by its path."""
    paths = sorted(directory.rglob("*")) if directory.exists() else []
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths if path.is_file()}


def copied(directory: Path, target: Path) -> Path:
    shutil.copytree(directory, target)
    return target


def edit_tensors(path: Path, **changed: Tensor) -> None:
    """Replace tensors of a safetensors file, dots in their names written as __."""
    tensors = load_file(path)
    for name, tensor in changed.items():
        assert name.replace("__", ".") in tensors
        tensors[name.replace("__", ".")] = tensor
    save_file(tensors, path, metadata={"format": "pt"})


def perturbed(directory: Path, target: Path, spread: float) -> Path:
    """A copy of a model with noise on every matrix."""
    copied(directory, target)
    generator = torch.Generator().manual_seed(9)
    path = target / "model.safetensors"
    noisy = {
        name: tensor + spread * tensor.std() * torch.randn(tensor.shape, generator=generator)
        for name, tensor in load_file(path).items()
        if tensor.ndim == 2
    }
    edit_tensors(path, **{name.replace(".", "__"): tensor for name, tensor in noisy.items()})
    return target


def made_up(config: ConvertConfig, path: Path) -> Path:
    """A record of every matrix and option, with losses that fall with the bits; nothing is measured."""
    plan = make_plan(config)
    linears = []
    for place, spec in enumerate(plan.specs.values()):
        options = [
            OptionRecord(
                o.desc, bits / spec.numel, bits, 0.1, o.qparams, 0.1, made_up_loss(place, spec, bits)
            )
            for codec, options in plan.tried(spec)
            for o, bits in ((o, codec.storage_bits(spec, o)) for o in options)
        ]
        if options:
            linears.append(LinearRecord(spec.key, spec.numel, tuple(options), 1.0, ties(plan).get(spec.key)))
    measurement.save(Measurement(**plan.origin, linears=tuple(linears)), path)
    return path


def made_up_loss(place: int, spec: LinearSpec, bits: int) -> float:
    return float((1 + place % 3) * spec.numel * 2e-6 * 4.0 ** -(bits / spec.numel))


def ties(plan: Plan) -> dict[str, str | None]:
    blocks = range(plan.model.n_blocks)
    return {linear.spec.key: linear.tie for index in blocks for linear in plan.model.linears(index)}


@dataclass(frozen=True)
class Stored:
    """A GGUF file, all its shards, as the gguf package reads it."""

    tensors: dict[str, gguf.ReaderTensor]
    fields: dict[str, Any]

    @classmethod
    def read(cls, directory: Path) -> Stored:
        readers = [gguf.GGUFReader(path) for path in sorted(directory.glob("*.gguf"))]
        tensors = {tensor.name: tensor for reader in readers for tensor in reader.tensors}
        assert len(tensors) == sum(len(reader.tensors) for reader in readers)
        fields = {name: field.contents() for name, field in readers[0].fields.items()}
        return cls(tensors, fields)

    @property
    def types(self) -> dict[str, str]:
        return {name: tensor.tensor_type.name for name, tensor in self.tensors.items()}

    @property
    def decoder_bpw(self) -> float:
        """8 × bytes of rows over weights, of all matrices inside blocks."""
        of = [t for t in self.tensors.values() if t.name.startswith("blk.") and len(t.shape) > 1]
        of = [t for t in of if "gate_inp" not in t.name]  # routers
        return 8 * sum(int(t.n_bytes) for t in of) / sum(int(t.n_elements) for t in of)

    def values(self, name: str) -> Tensor:
        """(out, in) float32."""
        tensor = self.tensors[name]
        return torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))


def file_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*.gguf"))


def stored_bits(directory: Path) -> dict[str, int]:
    """Bits of the five stored tensors of every linear, from the files alone."""
    bits: dict[str, int] = {}
    for path in directory.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            key, _, suffix = name.rpartition(".")
            if suffix in SUFFIXES:
                bits[key] = bits.get(key, 0) + 8 * tensor.numel() * tensor.element_size()
    return bits


def block_is_read(_model: Model, index: int) -> Any:
    """A stand-in for `Model.block` where nothing may be read."""
    raise AssertionError(f"block {index} was read")


class Events:
    """A listener that remembers, and stops where it is told to."""

    def __init__(self, stop_at: tuple[str, int] | None = None) -> None:
        self.seen: list[tuple[str, int]] = []
        self._stop_at = stop_at

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.seen.append((stage, done))
        if (stage, done) == self._stop_at:
            raise KeyboardInterrupt

    @property
    def stages(self) -> set[str]:
        return {stage for stage, _ in self.seen}


class Place:
    """A model, its calibration text, and a directory to work in, made anew for each test."""

    def __init__(self, directory: Path, model: Path, ids: Path) -> None:
        self.directory = directory
        self.model = model
        self.ids = ids
        self.out = directory / "out"

    def arguments(self, *more: str, **changed: Path) -> list[str]:
        """A command that makes EXL2, unless what is changed or added says otherwise; the last flag wins."""
        model, ids, out = (changed.get(name, getattr(self, name)) for name in ("model", "ids", "out"))
        where = ["-i", str(model), "-o", str(out), "-c", str(ids)]
        formats = ["--format", "exl2", "--measure", "exl2"]
        return ["convert", *where, "-b", "6.0", *formats, *SMALL_FLAGS, *more]

    def model_copy(self) -> Path:
        return copied(self.model, self.directory / "model")

    def without_target(self) -> list[str]:
        arguments = self.arguments()
        at = arguments.index("-b")
        return arguments[:at] + arguments[at + 2 :]
