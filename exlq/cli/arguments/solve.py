"""`exlq solve`: the best options for a size or a divergence, from a measurement alone."""

from __future__ import annotations

import argparse
from pathlib import Path

from exlq.names import FORMATS, HEAD_BITS

SUMMARY = "Choose every matrix's option for a size, from a measurement alone."
EXAMPLES = (
    "exlq solve measurement.json -b 4.2 -b 5",
    "exlq solve measurement.json --file-size 4.2GiB --types Q4_K,Q5_K,Q6_K",
    "exlq solve measurement.json --max-kl 0.01 --pin 'layers\\.0\\.=Q6_K' --format gguf",
    "exlq solve measurement.json --gpu-bytes 6GiB --cpu-bytes 10GiB",
    "exlq solve measurement.json --frontier",
    "exlq solve measurement.json -b 4.2 -o recipe.json    # then",
    "exlq convert -i MODEL -o OUT --recipe recipe.json",
)


def arrange(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("measurement", type=Path, help="measurement.json, or the directory it is in")
    _arrange_targets(parser.add_argument_group("targets, each may be given several times"))
    _arrange_budgets(parser.add_argument_group("two budgets (GGUF)"))
    arrange_choice(parser.add_argument_group("what may be chosen"))
    add = parser.add_argument_group("result").add_argument
    add("--frontier", action="store_true", help="every size from the smallest to the largest")
    add("--limit", type=int, default=40, metavar="N", help="lines of the frontier; 0 for all, default 40")
    add("-o", "--output", type=Path, metavar="FILE", help="write the target's recipe, for convert --recipe")
    add("--json", action="store_true", help="print JSON instead of tables")


def arrange_choice(group: argparse._ArgumentGroup) -> None:
    """The flags that narrow what the solver may choose."""
    add, heads = group.add_argument, ", ".join(map(str, HEAD_BITS))
    add("--format", metavar="LIST", help=f"comma list of {', '.join(FORMATS)}; default: all that can")
    add(
        "--types",
        metavar="LIST",
        help="what the decoder's linears may be: GGUF types as Q4_K,Q6_K, EXL2 widths as 3,4,5",
    )
    add(
        "--pin",
        action="append",
        default=[],
        metavar="REGEX=OPTION",
        help="a GGUF type, EXL2 bits or an EXL2 option's description by hand, where the key is found; "
        "repeatable, the first that fits counts",
    )
    add("-hb", "--head_bits", type=int, default=6, help=f"bits of lm_head: {heads}; default 6")


def _arrange_targets(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    bits = "average bits per weight of the decoder's linears"
    add("-b", "--bits", type=float, action="append", default=[], help=bits)
    size = "most bytes of the GGUF file or the EXL2 tensors, as 4.2GiB"
    add("--file-size", action="append", default=[], metavar="SIZE", help=size)
    kl = "most predicted KL divergence, in nats per token: the smallest size that keeps it"
    add("--max-kl", type=float, action="append", default=[], metavar="KL", help=kl)


def _arrange_budgets(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--gpu-bytes", metavar="SIZE", help="bytes for weights on the GPU, as 6GiB")
    add("--cpu-bytes", metavar="SIZE", help="bytes for weights beside it")
    add("--n-gpu-layers", type=int, metavar="N", help="layers on the GPU; default: the best number")
