"""`exlq eval`: a model beside the one it was made of."""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

from exlq.cli.shared import arrange_machine, console
from exlq.evaluate.run import evaluate
from exlq.report import tables

SUMMARY = "Compare a model with the one it was made of."


def arrange(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", type=Path, help="EXL2 or Hugging Face model directory")
    add("--base", type=Path, required=True, metavar="DIR", help="the model it was made of")
    add("-c", "--cal_dataset", type=Path, required=True, metavar="FILE", help="parquet file of text")
    add("--ctx", type=int, metavar="N", help="tokens in a chunk; default 512 or the model's maximum")
    add("--chunks", type=int, metavar="N", help="chunks at most; default all")
    add("--text-column", metavar="NAME", help="column to read; default text, messages or input_ids")
    add("--json", action="store_true", help="print JSON instead of a table")
    arrange_machine(parser)


def run(parsed: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(prefix="exlq-eval-", ignore_cleanup_errors=True) as scratch:
        found = evaluate(
            parsed.model,
            parsed.base,
            parsed.cal_dataset,
            Path(scratch),
            context=parsed.ctx,
            max_chunks=parsed.chunks,
            text_column=parsed.text_column,
            device=parsed.device,
        )
    if parsed.json:
        figures = {"model": str(parsed.model), "base": str(parsed.base), "text": str(parsed.cal_dataset)}
        print(json.dumps(figures | asdict(found) | {"protocol": tables.protocol(found)}, indent=1))
    else:
        console.print(tables.evaluation_table(str(parsed.model), found, parsed.cal_dataset))
