"""`exlq inspect`: the flags."""

from __future__ import annotations

import argparse
from pathlib import Path

SORTS = ("name", "bits", "bytes", "error", "sensitivity")  # of `inspect.ORDERS`

SUMMARY = "Look into a model, a measurement or a job: bits, types, errors."
EXAMPLES = (
    "exlq inspect MODEL",
    "exlq inspect OUT/exl2 --sort error",
    "exlq inspect model-Q4_K_M.gguf --filter ffn_down --type Q6_K",
    "exlq inspect model-Q4_K_M.gguf --by-layer",
    "exlq inspect measurement.json --sort sensitivity",
)


def arrange(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path",
        type=Path,
        metavar="X",
        help="directory of a model, of EXL2 or of a job; .gguf (of a split one the first), .safetensors, "
        "measurement.json",
    )
    choice = parser.add_argument_group("which tensors")
    choice.add_argument("--filter", metavar="REGEX", help="those whose name it finds")
    choice.add_argument("--type", metavar="TYPE", help="those of a type, as Q6_K or BF16; of a format: gguf")
    choice.add_argument("--sort", choices=SORTS, help="names rising, figures falling; default as stored")
    shown = parser.add_argument_group("how")
    shown.add_argument("--by-layer", action="store_true", help="a grid of layers and kinds, not a list")
    shown.add_argument("--metadata", action="store_true", help="the file's own keys too, long ones cut")
    shown.add_argument("--json", action="store_true", help="print JSON instead of tables")
