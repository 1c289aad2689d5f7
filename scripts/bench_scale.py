"""Time and memory of a conversion against its arithmetic floor, by the size of the model.

Usage: python scripts/bench_scale.py [--parts whole marginal] [--hidden 1024 2048] [--tokens 4096]

Models of random weights have the shapes of real Llamas, a few blocks and a small vocabulary, so that head
and embedding do not count. The real passes run on them: gradients, measurement of all options of both
formats, quantization to both. The floor is what the operations would take at the rate of a matrix product
measured in the same run (exlq/sizing/flops.py). Each shape runs with two counts of tokens; a line through
both, by kind of work, gives the time of a whole model on 262,144 tokens: that is extrapolated, not run.

Parts: `whole` (time over floor, and with twice the options), `marginal` (one more option), `linear` (time
and memory after 1, 2 and 3 blocks, and against tokens), `seven` (a 7B shape: memory, time), `gpu` (the 7B
shape on a GPU, beside exllamav2's converter). Every part can be run by itself.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for its neighbours, as a file run by path

from exlq.names import FORMATS
from scripts import scale_tables as tables
from scripts.random_llama import Shape, write_model
from scripts.scale_gpu import beside_exllamav2
from scripts.scale_marginal import marginal
from scripts.scale_run import Run, extrapolated, run, settings

SHAPES = {
    1024: Shape(1024, 2816, 16, 16, 24, 2048),
    2048: Shape(2048, 5632, 32, 4, 22, 2048),
    4096: Shape(4096, 11008, 32, 32, 32, 2048),
}
SEVEN_B = Shape(4096, 11008, 32, 32, 32, 32000)
WHOLE_TOKENS = 262_144
SOME_OPTIONS = 6
FEWEST_OPTIONS, MORE_TOKENS = 2, 4  # of the second run
MOST_MEMORY = 6_000_000_000


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints markdown tables."""
    parsed = _parser().parse_args(arguments)
    torch.set_num_threads(parsed.threads)
    print(tables.machine(parsed.threads), flush=True)
    for part in parsed.parts:
        PARTS[part](parsed)
    print(f"\n{tables.machine(parsed.threads)}")
    return 0


def whole(parsed: argparse.Namespace) -> None:
    """Time over floor of two runs, and of a whole model."""
    for shape in map(SHAPES.__getitem__, parsed.hidden):
        blocks = parsed.blocks or (1 if shape.hidden >= 4096 else 2)
        with made(shape, blocks) as model:
            runs = both(model, parsed, blocks)
        found = extrapolated(runs, shape.blocks, WHOLE_TOKENS)
        print(tables.whole(shape, runs, found, WHOLE_TOKENS), flush=True)


def margins(parsed: argparse.Namespace) -> None:
    """What an option more takes."""
    for hidden in parsed.hidden:
        found = [marginal(name, hidden, parsed.options, parsed.repeat) for name in FORMATS]
        print(tables.marginal(hidden, found), flush=True)


def linear(parsed: argparse.Namespace) -> None:
    """Time and memory by blocks, in one run; time by tokens, in three of one block."""
    shape, blocks = SHAPES[parsed.hidden[0]], parsed.blocks or 3
    with made(shape, blocks) as model:
        few = parsed.options or SOME_OPTIONS
        print(tables.by_blocks(shape, ran(model, parsed, blocks, parsed.tokens, few)), flush=True)
        runs = [ran(model, parsed, 1, factor * parsed.tokens, few) for factor in (1, 2, 4)]
    print(tables.by_tokens(shape, runs), flush=True)


def seven(parsed: argparse.Namespace) -> None:
    """The first blocks of a 7B shape, the rest extrapolated."""
    blocks = parsed.blocks or 1
    with made(SEVEN_B, blocks) as model:
        runs = both(model, parsed, blocks)
    print(tables.whole(SEVEN_B, runs, extrapolated(runs, SEVEN_B.blocks, WHOLE_TOKENS), WHOLE_TOKENS))
    print(tables.memory(runs, MOST_MEMORY), flush=True)


def gpu(parsed: argparse.Namespace) -> None:
    """A whole conversion of the 7B shape on a GPU, and exllamav2's."""
    if not torch.cuda.is_available():
        print("\nNo GPU is here: the comparison with exllamav2 on one was not run.")
        return
    blocks = parsed.blocks or SEVEN_B.blocks
    with made(SEVEN_B, blocks) as model:
        print(beside_exllamav2(model, blocks, parsed.tokens, parsed.length, "cuda"))


@contextmanager
def made(shape: Shape, blocks: int) -> Iterator[Path]:
    """A model directory with so many blocks, for the length of a `with`."""
    with tempfile.TemporaryDirectory(prefix="exlq-bench-") as scratch:
        write_model(Path(scratch, "model"), shape, blocks)
        yield Path(scratch, "model")


def both(model: Path, parsed: argparse.Namespace, blocks: int) -> list[Run]:
    """A run, and one of more tokens in which hardly an option is measured: trials see no tokens."""
    return [
        ran(model, parsed, blocks, parsed.tokens),
        ran(model, parsed, blocks, MORE_TOKENS * parsed.tokens, FEWEST_OPTIONS),
    ]


def ran(model: Path, parsed: argparse.Namespace, blocks: int, tokens: int, options: int | None = None) -> Run:
    with tempfile.TemporaryDirectory(prefix="exlq-bench-") as work:
        config = settings(model, Path(work, "out"), tokens, parsed.length, parsed.device)
        return run(config, Path(work), blocks, parsed.formats, options)


PARTS = {"whole": whole, "marginal": margins, "linear": linear, "seven": seven, "gpu": gpu}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=["whole", "marginal"])
    add("--hidden", nargs="+", type=int, choices=SHAPES, default=[1024, 2048])
    add("--blocks", type=int, help="of the models that are made; default 2, 1 of width 4096, 3 of `linear`")
    add("--tokens", type=int, default=4096, help="of the smaller run; default 4096")
    add("--length", type=int, default=2048, help="tokens in a row; default 2048")
    add("--formats", nargs="+", choices=FORMATS, default=list(FORMATS), help="quantized to; both measured")
    add("--options", type=int, help="measured of each format; default all in `marginal`, 6 in `linear`")
    add("--repeat", type=int, default=3, help="of `marginal`; default 3")
    add("--threads", type=int, default=2)
    add("--device", default="cpu", help="of all parts but `gpu`; default cpu")
    return parser


if __name__ == "__main__":
    sys.exit(main())
