"""What the commands share: where they print, and the flags of the machine."""

from __future__ import annotations

import argparse

from rich.console import Console

console = Console(soft_wrap=True)
errors = Console(stderr=True, soft_wrap=True)


def arrange_machine(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--seed", type=int, default=0, help="of everything drawn by lot; default 0")
    add("--threads", type=int, metavar="N", help="threads of the arithmetic; default torch's")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, mps; default cpu")


def show_progress(stage: str, done: int, total: int) -> None:
    console.print(f"{stage} {done}/{total}", highlight=False)
