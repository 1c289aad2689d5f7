"""The weights of a GGUF file in the model its checkpoint describes, run by torch."""

from __future__ import annotations

from pathlib import Path

from exlq.errors import FormatError, ModelError
from exlq.formats.gguf.reader import GgufFile
from exlq.formats.gguf.tensors import file_tensors
from exlq.formats.gguf.weights import GgufWeights
from exlq.models.config import read_json
from exlq.models.model import Model
from exlq.models.open import open_model

_HEAD = "output.weight"


def open_gguf(path: Path) -> GgufFile:
    """A GGUF file, or all shards of one given by the first.

    Raises:
        ModelError: if it is missing or broken.
    """
    if not path.is_file():
        raise ModelError(f"{path}: no such file, a GGUF file was wanted; check the path")
    try:
        return GgufFile(path)
    except FormatError as exc:
        raise ModelError(str(exc)) from exc


def with_weights(base: Model, directory: Path, file: GgufFile) -> Model:
    """The model of `directory`, opened as `base`, with the file's weights, dequantized as they are read.

    `file` must stay open as long as the model is used.

    Raises:
        ModelError: if the file does not hold the tensors of that model.
    """
    if base.family.gguf is None:
        raise ModelError(f"{directory}: llama.cpp knows no {base.family.name}; give an EXL2 directory")
    if base.tied and _HEAD in file.tensors:
        raise ModelError(
            f"{file.path} has a head apart from its embedding, {directory} one matrix for both; "
            "add --runtime llama.cpp"
        )
    linears = [linear for index in range(base.n_blocks) for linear in base.linears(index)]
    ties = {linear.spec.key: linear.tie for linear in linears if linear.tie}
    try:
        entries = file_tensors(base.weights, read_json(directory), base.family.gguf, ties, base.tied)
        return open_model(directory, GgufWeights(file, entries), device=base.device)
    except FormatError as exc:
        raise ModelError(f"{exc}; was it made of {directory}?") from exc
