"""What a conversion of a model would take from a text, in tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from exlq.calibration import cut_rows, heldout_mask, read_stream, row_length
from exlq.checkpoint.hashes import tokenizer_hash
from exlq.doctor.record import Tokens
from exlq.doctor.sample import Sample
from exlq.sizing.effort import EFFORTS, NORMAL, rows_of
from exlq.sizing.shapes import read_shape


def count_tokens(
    sample: Sample,
    tokenizer: PreTrainedTokenizerBase,
    model: Path,
    rows: int | None,
    length: int | None,
    parse_special: bool,
) -> Tokens:
    """The tokens as a conversion reads them, and the rows it would cut; of a sample, scaled to the file.

    Raises:
        CalibrationError: if a conversion could not use the text.
        ModelError: if the model's sizes are not known.
    """
    shape = read_shape(model)
    length = row_length(length, shape.max_length)
    effort = EFFORTS[NORMAL]
    wanted = rows_of(effort.quantize_tokens, length) if rows is None else rows
    named = None if sample.source.column == sample.source.kind else sample.source.column
    stream = read_stream(sample.source.path, tokenizer, named, parse_special)
    tokens = len(stream.ids)
    if sample.sampled:
        tokens = round(tokens * sample.rows / sample.source.rows)
    else:
        cut_rows(stream, wanted, length, tokenizer_hash(model))  # refuses what a conversion would
    fitting = min(wanted, tokens // length)
    heldout = int(heldout_mask(fitting).sum())
    measured = min(rows_of(effort.measure_tokens, length), tokens // length)
    widest = max(spec.in_features for spec in shape.linears)
    unknown = tokenizer.unk_token_id
    return Tokens(
        tokens=tokens,
        distinct=len(np.unique(stream.ids)),
        vocabulary=len(tokenizer),
        unknown=0
        if unknown is None
        else int((stream.ids == unknown).sum() * tokens // max(1, len(stream.ids))),
        rows_wanted=wanted,
        rows=fitting,
        row_length=length,
        heldout=heldout,
        widest=widest,
        per_channel=(fitting - heldout) * length / widest,
        measured_per_channel=(measured - int(heldout_mask(measured).sum())) * length / widest,
    )
