"""What tests of whole conversions share."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from exlq.models import Model
from exlq.pipeline import job
from exlq.pipeline.config import ConvertConfig
from exlq.pipeline.progress import Progress, silent

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
    return ConvertConfig(
        in_dir=in_dir, out_dir=out_dir, calibration=calibration, **{"bits": 6.0, **SMALL, **changes}
    )


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
        """A command that works, unless what is changed or added says otherwise; the last flag wins."""
        model, ids, out = (changed.get(name, getattr(self, name)) for name in ("model", "ids", "out"))
        where = ["-i", str(model), "-o", str(out), "-c", str(ids)]
        return ["convert", *where, "-b", "6.0", *SMALL_FLAGS, *more]

    def model_copy(self) -> Path:
        return copied(self.model, self.directory / "model")

    def without_target(self) -> list[str]:
        arguments = self.arguments()
        at = arguments.index("-b")
        return arguments[:at] + arguments[at + 2 :]
