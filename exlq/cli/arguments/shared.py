"""The flags that commands share: of the text and of the machine."""

from __future__ import annotations

import argparse
from pathlib import Path

from exlq.names import ROW_MODES


def arrange_calibration(parser: argparse._ActionsContainer) -> None:
    add = parser.add_argument
    add("-c", "--cal_dataset", type=Path, metavar="FILE", help="parquet file of text; default: bundled")
    add("-r", "--dataset_rows", type=int, metavar="N", help="rows to calibrate on; default 204,800 tokens")
    add("-l", "--length", type=int, metavar="N", help="tokens in a row; default 2048 or the model's maximum")
    add("--rows", choices=ROW_MODES, default="spread", help="rows from all over the text, or its first")
    add("--text-column", metavar="NAME", help="column to read; default text, messages or input_ids")
    add("--parse-special", action="store_true", help="let special tokens spelled out in text be special")


def arrange_machine(parser: argparse._ActionsContainer, several: str = "") -> None:
    """`several` is said of `--device`, where it may name several."""
    add = parser.add_argument
    add("--seed", type=int, default=0, help="of everything drawn by lot; default 0")
    add("--threads", type=int, metavar="N", help="threads of the arithmetic; default torch's")
    add("--device", default="cpu", help=f"cpu, cuda, cuda:1, mps{several}; default cpu")
