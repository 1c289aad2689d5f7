"""`exlq quantize`: a GGUF file in, one of other types out."""

from __future__ import annotations

import argparse
from pathlib import Path

from exlq.names import SEARCHES

SUMMARY = "Quantize a GGUF file, by rounding weighted with an importance matrix."
EXAMPLES = (
    "exlq quantize model-F16.gguf Q4_K_M --imatrix imatrix.gguf",
    "exlq quantize model-00001-of-00003.gguf merged.gguf COPY",
)


def arrange(parser: argparse.ArgumentParser) -> None:
    parser.usage = "exlq quantize [options] IN.gguf [OUT.gguf] TYPE [THREADS]"
    add = parser.add_argument
    add(
        "arguments",
        nargs="+",
        metavar="IN.gguf [OUT.gguf] TYPE [THREADS]",
        help="a file of floats, of a split one the first; default OUT: IN's name with the TYPE; "
        "TYPE: a recipe of llama-quantize, as Q4_K_M, or COPY",
    )
    add("--imatrix", type=Path, metavar="FILE", help="importance matrix, GGUF or .dat")
    add("--include-weights", action="append", default=[], metavar="PART", help="use only entries so named")
    add("--exclude-weights", action="append", default=[], metavar="PART", help="use no entries so named")
    add("--tensor-type", action="append", default=[], metavar="REGEX=TYPE", help="types by hand; repeatable")
    add("--tensor-type-file", type=Path, metavar="FILE", help="such items from a file")
    add("--output-tensor-type", metavar="TYPE", help="type of output.weight")
    add("--token-embedding-type", metavar="TYPE", help="type of token_embd.weight")
    add("--pure", action="store_true", help="the recipe's main type for all tensors")
    add("--leave-output-tensor", action="store_true", help="keep output.weight as it is")
    add("--allow-requantize", action="store_true", help="also round tensors that are quantized already")
    add("--override-kv", action="append", default=[], metavar="KEY=TYPE:VALUE", help="set metadata")
    add("--split-size", metavar="SIZE", help="largest file, as 2GiB; default one file")
    add("--keep-split", action="store_true", help="the same shards as IN")
    add(
        "--search",
        choices=SEARCHES,
        default="best",
        help="how hard scales are searched; default best; fast is several times as fast",
    )
    add("--dry-run", action="store_true", help="print types and sizes, write nothing")
    add("--threads", type=int, metavar="N", help="threads of the arithmetic; default torch's")
