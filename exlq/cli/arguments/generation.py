"""The flags of the commands that use a model: which, how tokens are drawn, on what it runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from exlq.names import FORMATS


def arrange_model(group: argparse._ActionsContainer) -> None:
    add = group.add_argument
    add(
        "model",
        type=Path,
        metavar="X",
        help="EXL2 or Hugging Face directory, GGUF file (of a split one the first), or a directory that "
        "exlq convert has made",
    )
    add("--format", choices=FORMATS, help="which of a job's outputs; default gguf if llama.cpp is installed")


def arrange_sampling(group: argparse._ActionsContainer) -> None:
    add = group.add_argument
    add("-n", "--max-tokens", type=int, default=512, metavar="N", help="most tokens of an answer; 512")
    add("--temperature", type=float, default=0.8, metavar="T", help="0 takes the likeliest token; 0.8")
    add("--top-k", type=int, default=40, metavar="K", help="draw from the K likeliest, 0 from all; 40")
    add("--top-p", type=float, default=0.95, metavar="P", help="from the likeliest that make up P; 0.95")
    add("--min-p", type=float, default=0.05, metavar="P", help="from those of P times the likeliest's; 0.05")
    add("--repeat-penalty", type=float, default=1.0, metavar="F", help="against repetition; 1 is none")
    add("--seed", type=int, metavar="N", help="the same answer again; default by lot, shown at the end")
    add("--stop", action="append", default=[], metavar="TEXT", help="ends an answer; repeatable")


def arrange_runtime(group: argparse._ActionsContainer) -> None:
    """What every model takes, then what only GGUF files do."""
    add = group.add_argument
    add("--ctx-size", type=int, metavar="N", help="tokens of prompt and answer; 4096 or the model's maximum")
    add("--threads", type=int, metavar="N", help="threads of the arithmetic")
    add("--n-gpu-layers", type=int, metavar="N", help="GGUF: blocks on the GPU; default all that fit")
    add("--no-mmap", action="store_true", help="GGUF: read the file into memory, do not map it")
    add("--mlock", action="store_true", help="GGUF: keep the file in memory, let none of it be swapped out")


def arrange_device(group: argparse._ActionsContainer) -> None:
    """What only directories take."""
    add = group.add_argument
    add("--device", metavar="NAME", help="directories: cpu, cuda, cuda:1, mps; default cuda where it is")
    add("--dtype", choices=("float32", "bf16"), help="directories: default float32 on cpu, else bf16")
