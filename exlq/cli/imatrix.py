"""`exlq imatrix`: the importance matrix of a model over a text, as llama-imatrix makes it."""

from __future__ import annotations

import argparse
from pathlib import Path

from exlq.cli.shared import arrange_calibration, arrange_machine, console, show_progress
from exlq.pipeline.imatrix import ImatrixConfig, collect

SUMMARY = "Write the importance matrix of a model, for `exlq quantize` or llama-quantize."


def arrange(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-i", "--in_dir", type=Path, required=True, metavar="DIR", help="Hugging Face model directory")
    add("-o", "--output", type=Path, required=True, metavar="FILE", help="FILE.gguf, or FILE.dat (legacy)")
    arrange_calibration(parser)
    arrange_machine(parser)


def run(parsed: argparse.Namespace) -> None:
    config = ImatrixConfig(
        in_dir=parsed.in_dir,
        output=parsed.output,
        calibration=parsed.cal_dataset,
        rows=parsed.dataset_rows,
        length=parsed.length,
        row_mode=parsed.rows,
        text_column=parsed.text_column,
        parse_special=parsed.parse_special,
        seed=parsed.seed,
        device=parsed.device,
    )
    found, n_heldout = collect(config, show_progress)
    console.print(
        f"{config.output}: {len(found.entries)} entries from {found.chunk_count} rows of {found.chunk_size} "
        f"tokens of {found.datasets[0]}; {n_heldout} more are held out, as in convert",
        markup=False,
        highlight=False,
    )
