"""An evaluation from directories and a text file."""

from __future__ import annotations

from pathlib import Path

import torch

from exlq.calibration import evaluation_chunks, load_tokenizer, row_length
from exlq.checkpoint import open_checkpoint
from exlq.errors import ConfigError, ModelError
from exlq.evaluate.divergence import Divergence, compare
from exlq.formats.exl2_directory import Exl2Weights, is_exl2
from exlq.models import Model, open_model
from exlq.types import Weights
from exlq.workspace import Workspace

DEFAULT_CONTEXT = 512
LEAST_CONTEXT = 3  # whose second half has one token to be predicted


def evaluate(
    model_dir: Path,
    base_dir: Path,
    text: Path,
    scratch: Path,
    *,
    context: int | None = None,
    max_chunks: int | None = None,
    text_column: str | None = None,
    device: str = "cpu",
) -> Divergence:
    """Compares the model in `model_dir` with its base on a parquet file's text.

    Args:
        scratch: an empty directory for working files.
        context: tokens in a chunk; 512, or the base's maximum if that is less, where None.

    Raises:
        InputError: if a directory, the text or a setting cannot be used.
    """
    base, model = (open_any(directory, usable_device(device)) for directory in (base_dir, model_dir))
    if model.vocab_size != base.vocab_size:
        raise ModelError(
            f"{model_dir} has {model.vocab_size} tokens, {base_dir} has {base.vocab_size}: "
            "give the base the model was made of"
        )
    length = row_length(
        min(DEFAULT_CONTEXT, base.max_length) if context is None else context, base.max_length
    )
    if length < LEAST_CONTEXT:
        raise ConfigError(f"--ctx {length}: at least {LEAST_CONTEXT} is wanted, half of it is scored")
    chunks = evaluation_chunks(text, load_tokenizer(base_dir), length, max_chunks, text_column)
    return compare(base, model, chunks, Workspace(scratch))


def open_any(directory: Path, device: torch.device) -> Model:
    """The model in an EXL2 or a Hugging Face directory."""
    if not directory.is_dir():
        raise ModelError(f"{directory}: no such directory, a model directory was wanted; check the path")
    weights: Weights = Exl2Weights(directory) if is_exl2(directory) else open_checkpoint(directory)
    return open_model(directory, weights, device=device)


def usable_device(name: str) -> torch.device:
    """The device of that name, tried out.

    Raises:
        ConfigError: if torch has no such device here.
    """
    try:
        device = torch.device(name)
        float(torch.zeros(1, device=device)[0])
    except (RuntimeError, AssertionError) as exc:
        raise ConfigError(f"--device {name}: torch cannot use it here; cpu always works") from exc
    return device
