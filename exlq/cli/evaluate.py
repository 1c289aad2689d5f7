"""`exlq eval`: models beside the one they were made of."""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from exlq.cli.shared import arrange_machine, console
from exlq.evaluate.run import RUNTIMES, TORCH, Evaluation, Settings, evaluate_all
from exlq.report.evaluation import comparison_table, evaluation_table, protocol

SUMMARY = "Compare models with the one they were made of."


def arrange(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "models",
        type=Path,
        nargs="+",
        metavar="model",
        help="EXL2 or Hugging Face directory, or GGUF file (of a split one the first)",
    )
    add("--base", type=Path, required=True, metavar="MODEL", help="what they were made of: directory or GGUF")
    add("-c", "--cal_dataset", type=Path, required=True, metavar="FILE", help="parquet file of text")
    add("--runtime", choices=list(RUNTIMES), default=TORCH, help="what runs GGUF files; default torch")
    add(
        "--weights-only",
        action="store_true",
        help="with llama.cpp: dequantize GGUF files to F32 first, so that no activation is quantized",
    )
    add("--ctx", type=int, metavar="N", help="tokens in a chunk; default 512 or the model's maximum")
    add("--chunks", type=int, metavar="N", help="chunks at most; default all")
    add("--text-column", metavar="NAME", help="column to read; default text, messages or input_ids")
    add("--json", action="store_true", help="print JSON instead of a table; a list for several models")
    arrange_machine(parser)


def run(parsed: argparse.Namespace) -> None:
    settings = Settings(
        context=parsed.ctx,
        max_chunks=parsed.chunks,
        text_column=parsed.text_column,
        device=parsed.device,
        runtime=parsed.runtime,
        weights_only=parsed.weights_only,
        threads=torch.get_num_threads(),
    )
    with tempfile.TemporaryDirectory(prefix="exlq-eval-", ignore_cleanup_errors=True) as scratch:
        done = evaluate_all(parsed.models, parsed.base, parsed.cal_dataset, Path(scratch), settings)
    if parsed.json:
        objects = [_object(evaluation, parsed, settings) for evaluation in done]
        print(json.dumps(objects if len(objects) > 1 else objects[0], indent=1))
    elif len(done) > 1:
        console.print(comparison_table(done, parsed.cal_dataset, settings))
    else:
        console.print(evaluation_table(done[0], parsed.cal_dataset, settings))


def _object(evaluation: Evaluation, parsed: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    return {
        "model": str(evaluation.model),
        "base": str(parsed.base),
        "text": str(parsed.cal_dataset),
        "bytes": evaluation.n_bytes,
        "runtime": settings.runtime,
        "weights_only": settings.weights_only,
        **asdict(evaluation.found),
        "protocol": protocol(evaluation.found, settings),
    }
