"""`exlq eval`: models beside the one they were made of."""

from __future__ import annotations

import argparse
from pathlib import Path

from exlq.cli.arguments.shared import arrange_machine
from exlq.names import RUNTIMES, TORCH

SUMMARY = "Compare models with the one they were made of."
EXAMPLES = (
    "exlq eval OUT/exl2 --base MODEL -c text.parquet",
    "exlq eval ours.gguf other.gguf --base MODEL -c text.parquet --runtime llama.cpp",
)


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
    add("--runtime", choices=RUNTIMES, default=TORCH, help="what runs GGUF files; default torch")
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
