"""Chunks of text a model is judged on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from exlq.calibration.stream import read_stream
from exlq.errors import CalibrationError, ConfigError


def evaluation_chunks(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    max_chunks: int | None = None,
    text_column: str | None = None,
) -> Tensor:
    """The file's tokens in consecutive chunks, (n_chunks, context) int64, as llama-perplexity cuts them.

    Where the tokenizer puts BOS in front of a text, it opens the stream, and takes the place of the first
    token of every later chunk. What does not fill a chunk at the end is left out.

    Raises:
        ConfigError: if a number is out of range.
        CalibrationError: if the file cannot be used or has fewer than two chunks.

    Source: llama.cpp, tools/perplexity/perplexity.cpp, `perplexity`.
    """
    if context < 2 or (max_chunks is not None and max_chunks < 1):
        raise ConfigError(
            f"{max_chunks} chunks of {context} tokens were asked for; at least 1 of 2 is needed"
        )
    stream = read_stream(path, tokenizer, text_column)
    ids = stream.ids
    if stream.bos_id is not None:
        ids = np.concatenate([np.array([stream.bos_id], np.int32), ids])
    if len(ids) < 2 * context:
        raise CalibrationError(
            f"{path}: {len(ids)} tokens found in column {stream.source.column}, {2 * context} are needed "
            f"(two chunks of {context}); give a longer file or a smaller context"
        )
    n_chunks = min(len(ids) // context, max_chunks or len(ids))
    chunks = torch.from_numpy(ids[: n_chunks * context].reshape(n_chunks, context).astype(np.int64))
    if stream.bos_id is not None:
        chunks[:, 0] = stream.bos_id
    return chunks
