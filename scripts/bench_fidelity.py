"""KL divergence of our files beside others' of the same size: GGUF and EXL2.

    python scripts/bench_fidelity.py --model MODEL --calibration valid.parquet --evaluation test.parquet

GGUF, stock: the recipe's types (llama-quantize's rules), every tensor rounded by ggml_quantize_chunk with
an importance matrix of the very tokens that ours is calibrated on, as llama-imatrix collects it: none for
embedding and head. Ours: `exlq convert --file-size` with the bytes of the stock file. Both are run in
llama.cpp against the F32 file: dequantized to F32 (the weights), and as they are (with llama.cpp's
rounding of activations).
EXL2, theirs: the plain recipe of ExLlamaV2 (scripts/exllamav2_style.py) at --bits, on the same tokens.
Ours: the same --bits, and at most the bytes of theirs. Both are run in torch.
Without --evaluation, the rows held out of the calibration are scored; --other is a text of another kind,
by default code and documentation that came with Python. `s` is without measuring. --ablate runs ours
alone, once with everything and once without each method.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for its neighbours, as a file run by path

from exlq.pipeline.config import ConvertConfig
from exlq.pipeline.plan import make_plan
from scripts import fidelity_tables as tables
from scripts.fidelity_ablation import ablation, targets
from scripts.fidelity_bench import Bench
from scripts.fidelity_opponents import ExLlamaV2Style, Stock
from scripts.fidelity_tables import Pair
from scripts.fidelity_texts import texts

RECIPES, BITS = "Q5_K_M,Q4_K_M,Q3_K_M,Q2_K", "2.5,3,4,5"
ABLATED_RECIPES, ABLATED_BITS = "Q4_K_M,Q3_K_M,Q2_K", "2.5,4"


def main() -> None:
    given = _arguments()
    torch.set_num_threads(given.threads)
    recipes = _listed(given.recipes, ABLATED_RECIPES if given.ablate else RECIPES)
    bits = [float(b) for b in _listed(given.bits, ABLATED_BITS if given.ablate else BITS)]
    with tempfile.TemporaryDirectory(prefix="exlq-fidelity-") as directory:
        wanted = {"gguf": recipes, "exl2": bits}
        bench = _bench(given, Path(directory), [kind for kind, listed in wanted.items() if listed])
        print(_heading(bench))
        if given.ablate:
            for line in ablation(bench, given.ablate, targets(bench, recipes, bits)):
                print(line, flush=True)
            return
        if recipes:
            _print_pairs(bench, "gguf", "recipe", "stock", gguf_pairs(bench, recipes))
        if bits:
            _print_pairs(bench, "exl2", "bits", "theirs", exl2_pairs(bench, bits))
        print(
            "\nMeasuring: " + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in bench.seconds.items())
        )


def gguf_pairs(bench: Bench, recipes: Sequence[str]) -> Iterator[Pair]:
    """Stock's files of some recipes, and ours of their sizes."""
    stock = Stock(bench)
    with bench.in_llama_cpp() as scored:
        for recipe in recipes:
            theirs = stock.made(recipe)
            ours = bench.ours(replace(bench.config, file_size=theirs.bytes), "gguf")
            yield Pair(recipe, (theirs, ours), (scored(theirs.path, True), scored(ours.path, True)))


def exl2_pairs(bench: Bench, bits: Sequence[float]) -> Iterator[Pair]:
    """The plain recipe's models of some bits per weight, and ours of at most their bytes."""
    style = ExLlamaV2Style(bench)
    with bench.in_torch() as scored:
        for target in bits:
            theirs = style.made(target)
            ours = bench.ours(replace(bench.config, bits=style.bits_of_ours(target, theirs)), "exl2")
            yield Pair(f"{target:g}", (theirs, ours), (scored(theirs.path), scored(ours.path)))
    bench.seconds["theirs"] = style.seconds["measuring"]


def _print_pairs(bench: Bench, kind: str, first: str, theirs: str, made: Iterator[Pair]) -> None:
    """The table on the first text as it grows, then those on the others, and the bytes saved."""
    same, *others = bench.texts
    print(f"\n{kind.upper()}, {same}\n\n{tables.heading(first, theirs, kind)}", flush=True)
    pairs = []
    for pair in made:
        pairs.append(pair)
        print(tables.line(pair, same), flush=True)
    for text in others:
        print(f"\n{kind.upper()}, {text}\n\n{tables.heading(first, theirs, kind)}")
        print("\n".join(tables.line(pair, text) for pair in pairs))
    for text in bench.texts if len(pairs) > 1 else ():
        print("\n".join([tables.saved_heading(first, text), *tables.saved(pairs, text)]), flush=True)


def _bench(given: argparse.Namespace, scratch: Path, formats: Sequence[str]) -> Bench:
    config = ConvertConfig(
        in_dir=given.model,
        out_dir=scratch / "measuring",
        calibration=given.calibration,
        rows=given.rows,
        formats=tuple(formats),
        measure=tuple(formats),
        output_measurement=scratch / "measurement.json",
    )
    plan = make_plan(config)
    scored = texts(plan, given.evaluation, given.other, given.chunks, scratch)
    if given.ablate:
        scored = dict(list(scored.items())[:1])
    return Bench(config, plan, scored, given.threads, scratch)


def _heading(bench: Bench) -> str:
    record = bench.plan.rows.record
    counted = (f"{name} ({len(rows)} chunks of {rows.shape[1]})" for name, rows in bench.texts.items())
    return (
        f"{bench.config.in_dir.name}, calibrated on {record.file} ({record.rows} rows of "
        f"{record.row_length}), KL divergence on {', '.join(counted)}"
    )


def _listed(given: str | None, default: str) -> list[str]:
    """The items of a list with commas, which may be empty."""
    return [item for item in (default if given is None else given).split(",") if item]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="DIR")
    add("--calibration", type=Path, metavar="FILE", help="parquet file of text; default: bundled")
    add("--evaluation", type=Path, metavar="FILE", help="parquet file of text; default: held-out rows")
    add("--other", type=Path, metavar="FILE", help="parquet file of text of another kind; default: Python's")
    add("--recipes", metavar="LIST", help=f"of GGUF, empty for none; default {RECIPES}")
    add("--bits", metavar="LIST", help=f"a weight, of EXL2, empty for none; default {BITS}")
    add("--rows", type=int, metavar="N", help="rows quantized on; default as `exlq convert`")
    add("--chunks", type=int, metavar="N", help="chunks of each text scored at most; default all")
    add("--threads", type=int, default=1, metavar="N")
    add(
        "--ablate",
        nargs="?",
        const="all",
        metavar="LIST",
        help=f"methods, all by default; --recipes {ABLATED_RECIPES} --bits {ABLATED_BITS} if not given",
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
