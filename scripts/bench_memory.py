"""Peak anonymous memory of a 1.1-billion-parameter Llama shape through its first blocks.

Usage: python scripts/bench_memory.py [--blocks 2] [--rows 8] [--length 2048] [--threads 2]

Random weights of 22 blocks (2048 wide, 5632 inside, 32 heads of which 4 for keys, 32,000 tokens) are
written to a temporary directory (2.2 GB), then the passes of a conversion are run on them: gradients
through all blocks on 1024 tokens, measurement and quantization of the first blocks.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for its neighbours, as a file run by path

from exlq.formats.exl2_codec import Exl2Codec
from exlq.measurement import Measurement
from exlq.memory import PeakMemory
from exlq.numerics.precision import quick_products
from exlq.pipeline import measure, quantize, sensitivity
from exlq.pipeline.config import ConvertConfig
from exlq.pipeline.plan import Plan, make_plan
from exlq.pipeline.progress import silent
from exlq.pipeline.rounding import Rounding
from exlq.pipeline.state import machine
from exlq.workspace import Workspace
from scripts.random_llama import Shape, write_model

CODEC = Exl2Codec()
SHAPE = Shape(hidden=2048, inner=5632, heads=32, key_heads=4, blocks=22, vocabulary=32000)
BOUND_BYTES = 2_500_000_000


class Enough(Exception):  # noqa: N818
    """Raised when as many blocks as asked for are done."""


@quick_products()
def main() -> int:
    """Prints the peak of every pass; exit code 1 if one is above 2.5 GB."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory(prefix="exlq-bench-") as scratch:
        model_dir, work = Path(scratch, "model"), Path(scratch, "work")
        work.mkdir()
        write_model(model_dir, SHAPE, SHAPE.blocks)
        config = ConvertConfig(
            in_dir=model_dir,
            out_dir=Path(scratch, "out"),
            bits=4.0,
            rows=arguments.rows,
            measurement_rows=arguments.rows,
            length=arguments.length,
            measurement_length=arguments.length,
        )
        peak = run(make_plan(config), arguments.blocks, Workspace(work))
    print(f"highest of all: {peak / 1e9:.2f} GB of anonymous memory (bound {BOUND_BYTES / 1e9} GB)")
    return int(peak > BOUND_BYTES)


def run(plan: Plan, blocks: int, workspace: Workspace) -> int:
    """All passes on the first `blocks`; the highest peak in bytes."""
    peaks: list[int] = []
    with timed("gradients, all blocks, 1024 tokens") as watched:
        rows = plan.measurement_rows.ids[:2, :512]
        fisher = sensitivity.fisher(
            plan.model, rows, workspace, 0, workspace.directory / "s.safetensors", silent
        )
    peaks.append(watched.memory.bytes)
    stop = StopAfter(blocks)
    with timed(f"measuring {blocks} blocks") as watched:
        empty = Measurement(**plan.origin, extra={"made_with": machine()})
        run_until_enough(lambda: measure.measure(plan, fisher, empty, workspace, lambda _: None, stop))
    peaks.append(watched.memory.bytes)
    options = {spec.key: CODEC.options(spec)[13] for spec in plan.linears}
    options[plan.model.head.key] = CODEC.head_option(plan.model.head, 6)
    with timed(f"quantizing {blocks} blocks") as watched:
        rounding = Rounding(plan, CODEC, options, fisher)
        passes = quantize.quantized_linears(rounding, workspace, StopAfter(blocks))
        run_until_enough(lambda: [spec for spec, _ in passes])
    peaks.append(watched.memory.bytes)
    return max(peaks)


class StopAfter:
    """A listener that stops a pass after so many blocks."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks

    def __call__(self, stage: str, done: int, total: int) -> None:
        if done >= self.blocks:
            raise Enough


def run_until_enough(work: object) -> None:
    """Calls `work` and takes its `Enough` for an end."""
    assert callable(work)
    try:
        work()
    except Enough:
        return


class timed:  # noqa: N801
    """Watches time and memory inside a `with`, and prints both."""

    def __init__(self, label: str) -> None:
        self.label, self.memory = label, PeakMemory()

    def __enter__(self) -> timed:
        self.memory.__enter__()
        self.begin = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self.memory.__exit__()
        seconds = time.perf_counter() - self.begin
        print(f"{self.label:>36}: {seconds:7.1f} s, peak {self.memory.bytes / 1e9:.2f} GB", flush=True)


if __name__ == "__main__":
    sys.exit(main())
