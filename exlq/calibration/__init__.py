"""Parquet to token rows: what a model is calibrated on, and what it is evaluated on."""

from exlq.calibration.evaluation import evaluation_chunks
from exlq.calibration.rows import (
    MINIMUM_ROWS,
    CalibrationRecord,
    TokenRows,
    cut_rows,
    heldout_mask,
    random_rows,
    row_length,
    token_rows,
)
from exlq.calibration.source import Source, open_source, read_texts
from exlq.calibration.stream import TokenStream, read_stream
from exlq.calibration.tokenizer import bos_id, load_tokenizer

__all__ = [
    "MINIMUM_ROWS",
    "CalibrationRecord",
    "Source",
    "TokenRows",
    "TokenStream",
    "bos_id",
    "cut_rows",
    "evaluation_chunks",
    "heldout_mask",
    "load_tokenizer",
    "open_source",
    "random_rows",
    "read_stream",
    "read_texts",
    "row_length",
    "token_rows",
]
