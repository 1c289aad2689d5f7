"""What models are scored on: a text of the calibration's kind, and one of another."""

from __future__ import annotations

import ast
import platform
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from exlq.calibration import evaluation_chunks, load_tokenizer
from exlq.pipeline.plan import Plan

CONTEXT = 512
PIECE_CHARACTERS = 2000  # of one module's source, and of its documentation
MOST_CHARACTERS = 200_000


def texts(
    plan: Plan, evaluation: Path | None, other: Path | None, most: int | None, scratch: Path
) -> Mapping[str, Tensor]:
    """(n, length) int64 token rows by the text's name, that of the calibration's kind first.

    Without `evaluation` they are rows held out of the calibration, without `other` code and
    documentation that came with Python.
    """
    length = min(CONTEXT, plan.model.max_length)
    tokenizer = load_tokenizer(plan.config.in_dir)

    def chunks(path: Path) -> Tensor:
        return evaluation_chunks(path, tokenizer, length, most, None)

    same, unlike = f"held-out rows of {plan.rows.record.file}", f"Python {platform.python_version()}"
    if evaluation is None:
        first = {same: plan.checked_rows()[0][:most]}
    else:
        first = {evaluation.name: chunks(evaluation)}
    if other is not None:
        return first | {other.name: chunks(other)}
    return first | {f"code and documentation of {unlike}": chunks(python_text(scratch / "python.parquet"))}


def python_text(path: Path) -> Path:
    """A parquet file of the standard library: source and docstrings of its modules by turns."""
    pieces, length = [], 0
    for piece in _pieces():
        if length + len(piece) > MOST_CHARACTERS:
            break
        pieces.append(piece)
        length += len(piece)
    pq.write_table(pa.table({"text": pieces}), path)
    return path


def _pieces() -> Iterator[str]:
    """Of every public module by name: lines from its middle on, then its longer docstrings."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py")):
        source = path.read_text(encoding="utf-8")
        middle = source.find("\n", len(source) // 2) + 1
        yield source[middle : middle + PIECE_CHARACTERS]
        holders = (ast.Module, ast.ClassDef, ast.FunctionDef)
        nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, holders)]
        told = (ast.get_docstring(node) or "" for node in nodes)
        yield "\n\n".join(text for text in told if "\n" in text)[:PIECE_CHARACTERS]
