"""`exlq plan`: what fits, and what making it takes."""

from __future__ import annotations

import argparse
from pathlib import Path

from exlq.names import HEAD_BITS

CACHE_NAMES = ("f16", "q8_0", "q6", "q4_0")  # of `sizing.running.CACHES`

SUMMARY = "Find the largest size that fits into memory, from config.json alone."
EXAMPLES = (
    "exlq plan MODEL --memory 16GiB",
    "exlq plan MODEL --memory 24GiB --context 32768 --cache q8_0",
    "exlq plan MODEL --memory 8GiB --json",
)


def arrange(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="model directory; its config.json is enough")
    running = parser.add_argument_group("running the model")
    add = running.add_argument
    add("--memory", metavar="SIZE", help="as 16GiB, of CPU and GPU together; default: this machine's RAM")
    add("--context", type=int, metavar="N", help="tokens; default 8192 or the model's maximum")
    add("--cache", choices=CACHE_NAMES, default="f16", help="type of the KV cache; default f16")
    making = parser.add_argument_group("making it")
    add = making.add_argument
    add(
        "-hb",
        "--head_bits",
        type=int,
        choices=HEAD_BITS,
        default=6,
        metavar="N",
        help="of lm_head; default 6",
    )
    add("--gflops", type=float, metavar="N", help="of float32 matrix products; default: measured here")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
