"""`exlq doctor`: the flags."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "Look at a calibration text: schema, duplicates, languages, enough tokens."
EXAMPLES = (
    "exlq doctor calibration.parquet --model MODEL",
    "exlq doctor calibration.parquet --model MODEL -r 200 -l 2048",
    "exlq doctor --model MODEL    # the bundled text",
)


def arrange(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, nargs="?", metavar="FILE", help="parquet; default: bundled")
    reading = parser.add_argument_group("how a conversion would read it")
    add = reading.add_argument
    add("--model", type=Path, metavar="DIR", help="whose tokenizer and width count; without it, no tokens")
    add("-r", "--dataset_rows", type=int, metavar="N", help="rows to calibrate on; default 204,800 tokens")
    add("-l", "--length", type=int, metavar="N", help="tokens in a row; default 2048 or the model's maximum")
    add("--text-column", metavar="NAME", help="column to read; default text, messages or input_ids")
    add("--parse-special", action="store_true", help="let special tokens spelled out in text be special")
    parser.add_argument("--seed", type=int, default=0, help="of the rows drawn from a large file; default 0")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
