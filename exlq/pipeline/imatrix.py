"""The importance matrix of a model: what llama-imatrix would collect, from our own pass over the blocks."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from exlq.calibration import TokenRows, cut_rows, load_tokenizer, read_stream, row_length
from exlq.checkpoint.hashes import tokenizer_hash
from exlq.checkpoint.open import open_checkpoint
from exlq.default_calibration import default_calibration
from exlq.errors import ConfigError, ModelError
from exlq.evaluation.run import usable_device
from exlq.formats.gguf import metadata, tensors
from exlq.formats.gguf.imatrix import Entry, Imatrix, save
from exlq.formats.gguf.tensors import Entry as FileEntry
from exlq.models.config import read_json
from exlq.models.model import Model
from exlq.models.open import open_model
from exlq.names import Mode
from exlq.numerics.precision import quick_products
from exlq.pipeline import passes
from exlq.pipeline.config import LEAST, QUANTIZE_TOKENS
from exlq.pipeline.progress import Progress
from exlq.workspace import Workspace


@dataclass(frozen=True)
class ImatrixConfig:
    """What `exlq imatrix` is asked for; rows and length left None are those of a conversion.

    Raises:
        ConfigError: when made, if a number is too small or the output has no place.
    """

    in_dir: Path
    output: Path
    calibration: Path | None = None
    rows: int | None = None
    length: int | None = None
    row_mode: Mode = "spread"
    text_column: str | None = None
    parse_special: bool = False
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("rows", "length"):
            value, least = getattr(self, name), LEAST[name]
            if value is not None and value < least:
                raise ConfigError(f"{name} is {value}; at least {least} is wanted")
        if self.output.is_dir() or not self.output.parent.is_dir():
            raise ConfigError(f"-o {self.output}: want the name of a file in a directory that is there")


@quick_products()
def collect(config: ImatrixConfig, progress: Progress) -> tuple[Imatrix, int]:
    """Writes the importance matrix and gives it back, with the number of rows held out of it.

    The rows are those a conversion with these settings calibrates on.

    Raises:
        InputError: of the kind that fits, for whatever cannot work.
    """
    model = open_model(config.in_dir, open_checkpoint(config.in_dir), device=usable_device(config.device))
    entries, rows = file_entries(model, config.in_dir), _rows(config, model)
    with tempfile.TemporaryDirectory(dir=config.output.parent, prefix=f".{config.output.name}.") as scratch:
        found = importance_matrix(
            model, entries, rows.ids[~rows.heldout], rows.record.file, Workspace(Path(scratch)), progress
        )
    save(found, config.output)
    return found, int(rows.heldout.sum())


def file_entries(model: Model, directory: Path) -> tuple[FileEntry, ...]:
    """The tensors a GGUF file of the model has.

    Raises:
        ModelError: if llama.cpp cannot run the model.
    """
    family = model.family.gguf
    if family is None:
        raise ModelError(f"llama.cpp does not know {model.family.architectures[0]}; give another model")
    linears = [linear for index in range(model.n_blocks) for linear in model.linears(index)]
    ties = {linear.spec.key: linear.tie for linear in linears if linear.tie is not None}
    config = metadata.completed(read_json(directory))
    return tensors.file_tensors(model.weights, config, family, ties, model.tied)


def _rows(config: ImatrixConfig, model: Model) -> TokenRows:
    path = config.calibration or default_calibration()
    tokenizer, sha256 = load_tokenizer(config.in_dir), tokenizer_hash(config.in_dir)
    stream = read_stream(path, tokenizer, config.text_column, config.parse_special)
    length = row_length(config.length, model.max_length)
    wanted = config.rows if config.rows is not None else max(8, QUANTIZE_TOKENS // length)
    rows = cut_rows(stream, wanted, length, sha256, config.seed, config.row_mode)
    largest = int(rows.ids.max())
    if largest >= model.vocab_size:
        raise ModelError(
            f"the tokenizer gives token {largest}, the model has {model.vocab_size}: "
            "give the tokenizer that belongs to the model"
        )
    return rows


def importance_matrix(
    model: Model,
    entries: Sequence[FileEntry],
    ids: Tensor,
    dataset: str,
    workspace: Workspace,
    progress: Progress,
) -> Imatrix:
    """Sums of squared inputs of every matrix of a GGUF file over token rows.

    The head is among them, under the embedding's name where they are one tensor.

    Args:
        entries: of the file.
        ids: (n_rows, length) int64.
        dataset: what the rows were taken from.
    """
    states = passes.embedded(model, ids, workspace, torch.float32)
    sums: dict[str, Squares] = {}  # by the linear's key
    for index in range(model.n_blocks):
        by_stage: dict[str, Squares] = {}
        add = _adding_squares(by_stage)
        with model.block(index) as block:
            for rows in passes.batches(ids):
                states[rows] = block.forward(states[rows], add, add).cpu()
        for stage, linears in passes.linears_by_stage(model, index).items():
            for spec in (linear.spec for linear in linears):
                sums[spec.key] = by_stage.get(stage) or Squares(torch.zeros(spec.in_features), 0)
        progress("collecting", index + 1, model.n_blocks)
    head: dict[str, Squares] = {}
    for rows in passes.batches(ids):
        _adding_squares(head)("head", model.final_norm(states[rows]))
    sums[model.embedding_key if model.tied else model.head.key] = head["head"]
    workspace.remove("states")
    found = {}
    for entry in (entry for entry in entries if entry.matrix):
        keys = [source.removesuffix(".weight") for source in entry.sources[: None if entry.stacked else 1]]
        if all(key in sums for key in keys):
            found[entry.name] = _entry([sums[key] for key in keys])
    return Imatrix(found, (dataset,), chunk_count=len(ids), chunk_size=ids.shape[1])


class Squares(NamedTuple):
    """The sum of squares of an input's channels, (in_features,) float64, and over how many tokens."""

    total: Tensor
    n_tokens: int


def _entry(matrices: Sequence[Squares]) -> Entry:
    """Of one matrix, or of every expert's."""
    sums = torch.stack([squares.total.float() for squares in matrices])
    return Entry(sums, torch.tensor([float(squares.n_tokens) for squares in matrices]))


def _adding_squares(sums: dict[str, Squares]) -> Callable[[str, Tensor], None]:
    def add(stage: str, x: Tensor) -> None:
        tokens = x.float().square().flatten(0, -2)
        squares, n = tokens.sum(0, dtype=torch.float64).cpu(), len(tokens)
        known = sums.get(stage)
        sums[stage] = (
            Squares(squares, n) if known is None else Squares(known.total + squares, known.n_tokens + n)
        )

    return add
