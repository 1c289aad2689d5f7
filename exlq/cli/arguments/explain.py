"""`exlq explain`: why every matrix has the option it has."""

from __future__ import annotations

import argparse
from pathlib import Path

from exlq.cli.arguments.solve import arrange_choice

SUMMARY = "Say why every matrix has its option, and what more bytes would buy."
EXAMPLES = (
    "exlq explain measurement.json -b 4.2",
    "exlq explain measurement.json --recipe recipe.json --filter 'down_proj' --spend 200MiB",
    "exlq explain measurement.json --recipe recipe.json --against other.json",
)


def arrange(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("measurement", type=Path, help="measurement.json, or the directory it is in")
    add = parser.add_argument_group("what is explained, one of these").add_argument
    add("--recipe", type=Path, metavar="FILE", help="a recipe of exlq solve")
    add("-b", "--bits", type=float, help="average bits per weight of the decoder's linears")
    add("--file-size", metavar="SIZE", help="most bytes of the GGUF file or the EXL2 tensors")
    add("--max-kl", type=float, metavar="KL", help="most predicted KL divergence")
    arrange_choice(parser.add_argument_group("what may be chosen"))
    add = parser.add_argument_group("what is shown of it").add_argument
    add("--spend", metavar="SIZE", help="bytes more to spend; default 100MiB, or 5 %% of a small model")
    add("--against", type=Path, metavar="FILE", help="another recipe: how the two differ")
    add("--filter", metavar="REGEX", help="only tensors whose key it is found in")
    add("--limit", type=int, metavar="N", help="tensors in a table; 0 for all, default 30")
    add("--json", action="store_true", help="print JSON instead of tables; all tensors without --limit")
