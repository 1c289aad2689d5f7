"""`exlq eval`: models beside the one they were made of."""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from exlq.cli.screen import Screen
from exlq.evaluation.run import Evaluation, Settings, evaluate_all
from exlq.report.evaluation import comparison_table, evaluation_table, protocol


def run(parsed: argparse.Namespace, screen: Screen) -> None:
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
    objects = [_object(evaluation, parsed, settings) for evaluation in done]
    if parsed.json:
        print(json.dumps(objects if len(objects) > 1 else objects[0], indent=1))
    elif len(done) > 1:
        screen.show(comparison_table(done, parsed.cal_dataset, settings), {"models": objects})
    else:
        screen.show(evaluation_table(done[0], parsed.cal_dataset, settings), {"models": objects})


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
