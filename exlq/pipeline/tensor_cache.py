"""Quantized tensors kept by a hash of everything they depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from exlq import __version__
from exlq.files import atomic_write_bytes
from exlq.pipeline import verify
from exlq.pipeline.passes import linears_by_stage
from exlq.pipeline.plan import Plan
from exlq.types import LinearSpec, Option

TENSORS = "tensors"
DIGEST, REACHED = "exlq.digest", "reached"
NAME_DIGITS = 40  # of a sha256 in hex


class Kept(NamedTuple):
    """What a matrix is stored as, and what was out of the ordinary about the Hessian it was rounded by."""

    tensors: Mapping[str, Tensor]
    raised: int = 0  # how often the damping was multiplied by ten
    dead: int = 0  # input channels that are zero in every token
    reached: int | None = None  # tokens of its own, where it is an expert's and they are few


class TensorCache:
    """The stored tensors of matrices, one file each; without a directory nothing is kept."""

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory

    def has(self, name: str) -> bool:
        return self._directory is not None and self._path(name).is_file()

    def read(self, name: str) -> Kept | None:
        """The tensors kept under a name; None where there are none, or they are not those that were kept."""
        if not self.has(name):
            return None
        try:
            with safe_open(self._path(name), framework="pt") as file:
                tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
                told = file.metadata() or {}
            reached = int(told[REACHED]) if REACHED in told else None
            kept = Kept(tensors, int(told["raised"]), int(told["dead"]), reached)
        except (SafetensorError, OSError, ValueError, KeyError):
            return None
        return kept if verify.digest(tensors) == told.get(DIGEST) else None

    def drop(self, name: str) -> None:
        """Forgets what is kept under a name."""
        self._path(name).unlink(missing_ok=True)

    def write(self, name: str, kept: Kept) -> None:
        """Keeps tensors; the name is taken once all bytes are on the disk."""
        if self._directory is None:
            return
        self._directory.mkdir(exist_ok=True)
        path = self._path(name)
        stored = {key: tensor.cpu().contiguous() for key, tensor in kept.tensors.items()}
        told = {DIGEST: verify.digest(stored), "raised": str(kept.raised), "dead": str(kept.dead)}
        if kept.reached is not None:
            told[REACHED] = str(kept.reached)
        atomic_write_bytes(path, save(stored, metadata=told))

    def _path(self, name: str) -> Path:
        assert self._directory is not None
        return self._directory / f"{name}.safetensors"


def hashed(*parts: Any) -> str:
    """A name for what these values say, which JSON can hold."""
    text = json.dumps(parts, sort_keys=True, default=dict)
    return hashlib.sha256(text.encode()).hexdigest()[:NAME_DIGITS]


def bytes_hash(tensor: Tensor) -> str:
    """SHA-256 of a tensor's values in hex."""
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().data).hexdigest()


def basis(plan: Plan, codec: str) -> str:
    """What every quantized tensor of a format depends on: model, tokens, settings, program.

    Not on the number of threads and the device, with which a job does not go on unless it is told to.
    """
    config = plan.config
    tokens = [plan.quantized_on, plan.measurement_rows.ids, plan.measurement_rows.heldout]
    return hashed(
        __version__,
        codec,
        plan.origin["model"],
        plan.origin["settings"],
        config.gptq,
        config.weighted,
        config.objective,
        asdict(config.methods),
        [bytes_hash(each) for each in tokens],
    )


def matrix_name(before: str, key: str, option: Option) -> str:
    """The name of one matrix whose inputs come from what `before` stands for."""
    return hashed(before, key, option.desc, option.qparams)


def matrix_alone(plan: Plan, codec: str, spec: LinearSpec, option: Option) -> str:
    """The name of a matrix that no other is quantized before: the embedding, or one rounded without text."""
    return matrix_name(hashed(basis(plan, codec), "alone"), spec.key, option)


def names(plan: Plan, options: Mapping[str, Option], begin: str) -> tuple[dict[str, str], Sequence[str]]:
    """The name of every linear's tensors, and of what is quantized before each block and before the head.

    The inputs of a stage come from all stages before it; linears of one stage do not feel one another.
    """
    found: dict[str, str] = {}
    places, before = [], begin
    for index in range(plan.model.n_blocks):
        places.append(before)
        for linears in linears_by_stage(plan.model, index).values():
            keys = [linear.spec.key for linear in linears]
            stage = {key: matrix_name(before, key, options[key]) for key in keys}
            before = hashed(list(stage.values()))
            found |= stage
    places.append(before)
    head = plan.model.head.key
    if head in options:
        found[head] = matrix_name(before, head, options[head])
    return found, places
