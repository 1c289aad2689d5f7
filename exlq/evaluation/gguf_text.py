"""Chunks of text by the tokenizer of a GGUF file, as llama.cpp has it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from exlq.calibration import Source, open_source, read_texts
from exlq.calibration.source import read_batches
from exlq.errors import CalibrationError
from exlq.evaluation.llamacpp import Runtime


def gguf_chunks(
    path: Path, runtime: Runtime, context: int, max_chunks: int | None = None, text_column: str | None = None
) -> Tensor:
    """The file's tokens in consecutive chunks, (n_chunks, context) int64, as llama-perplexity cuts them.

    Text rows are joined as `exlq.calibration` joins them and tokenized as one; BOS opens every chunk
    where the tokenizer adds one. What does not fill a chunk at the end is left out.

    Raises:
        CalibrationError: if the file cannot be used or has fewer than two chunks.
    """
    source = open_source(path, text_column)
    if source.kind == "messages":
        raise CalibrationError(
            f"{path}: column {source.column} holds chat, text or tokens were wanted; a chat template needs "
            "a model directory as --base"
        )
    ids = READERS[source.kind](source, runtime)
    bos = runtime.bos_id
    if bos is not None:
        ids = np.concatenate([np.array([bos], np.int64), ids])
    if len(ids) < 2 * context:
        raise CalibrationError(
            f"{path}: {len(ids)} tokens found in column {source.column}, {2 * context} are needed "
            f"(two chunks of {context}); give a longer file or a smaller context"
        )
    n_chunks = min(len(ids) // context, max_chunks or len(ids))
    chunks = torch.from_numpy(ids[: n_chunks * context].reshape(n_chunks, context))
    if bos is not None:
        chunks[:, 0] = bos
    return chunks


def _text_ids(source: Source, runtime: Runtime) -> NDArray[np.int64]:
    rows = (row for row in read_texts(source) if row is not None)
    text = "".join(row if row.endswith("\n") else f"{row}\n" for row in rows)
    return np.array(runtime.tokenize(text, add_special=False), np.int64)


def _stored_ids(source: Source, _: Runtime) -> NDArray[np.int64]:
    def parts() -> Iterator[NDArray[np.int64]]:
        for batch in read_batches(source):
            yield pc.list_flatten(batch).to_numpy(zero_copy_only=False).astype(np.int64)

    return np.concatenate([np.empty(0, np.int64), *parts()])


READERS = {"text": _text_ids, "input_ids": _stored_ids}
