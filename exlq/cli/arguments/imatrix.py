"""`exlq imatrix`: the importance matrix of a model over a text, as llama-imatrix makes it."""

from __future__ import annotations

import argparse
from pathlib import Path

from exlq.cli.arguments.shared import arrange_calibration, arrange_machine

SUMMARY = "Write the importance matrix of a model, for `exlq quantize` or llama-quantize."
EXAMPLES = ("exlq imatrix -i MODEL -o imatrix.gguf -c text.parquet",)


def arrange(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-i", "--in_dir", type=Path, required=True, metavar="DIR", help="Hugging Face model directory")
    add("-o", "--output", type=Path, required=True, metavar="FILE", help="FILE.gguf, or FILE.dat (legacy)")
    arrange_calibration(parser)
    arrange_machine(parser)
