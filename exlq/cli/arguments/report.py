"""`exlq report`: the flags."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "Write a page about a finished job: one HTML file that needs no network."
EXAMPLES = (
    "exlq report OUT",
    "exlq report OUT -o report.html --png plots",
    "exlq report measurement.json",
)


def arrange(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", type=Path, metavar="OUT", help="directory of a finished job, or a measurement.json")
    files = parser.add_argument_group("what is written")
    files.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="the page; default OUT/report.html, beside a measurement its name with .html",
    )
    files.add_argument("--png", type=Path, metavar="DIR", help="the plots as PNG too; takes matplotlib")
    files.add_argument("--svg", type=Path, metavar="DIR", help="the plots as SVG too; takes matplotlib")
