"""Allocations of the same bits beside one another: uniform, ExLlamaV2's annealer, ours; the same rounding.

Usage: python -m scripts.bench_allocation MODEL [-c CALIBRATION.parquet] [-e EVALUATION.parquet]
           [--format exl2] [--bits 2.5 3 4 5] [--chunks N] [--rows N] [--seed N] [--threads N]

From one measurement. Uniform: every decoder linear takes the same option, and what that leaves of the
budget is spent on the next better one for linears spread over the model. Annealed: the annealer on the
measured relative error of each linear's output, as a fraction of its norm. Ours: the least predicted loss.
Embedding and head are the same in all three. Exit code 1 if ours has not the lowest KL divergence at
every target.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from exlq.calibration import evaluation_chunks, load_tokenizer
from exlq.evaluation.divergence import Divergence, against
from exlq.evaluation.predictor import Blockwise, Predictor
from exlq.formats.codecs import CODECS
from exlq.measurement import LinearRecord, Measurement, OptionRecord
from exlq.pipeline import measured
from exlq.pipeline.allocate import Choice, measured_loss, records
from exlq.pipeline.config import ConvertConfig
from exlq.pipeline.output import Output
from exlq.pipeline.outputs import make_outputs
from exlq.pipeline.plan import make_plan
from exlq.pipeline.progress import silent
from exlq.pipeline.state import machine
from exlq.types import Option
from exlq.workspace import Workspace
from scripts.annealer import anneal

TARGETS: Mapping[str, tuple[float, ...]] = {"exl2": (2.5, 3.0, 4.0, 5.0), "gguf": (2.8, 3.5, 4.5)}
CONTEXT = 512
GOLDEN = (math.sqrt(5) - 1) / 2  # its multiples modulo 1 are spread evenly however many are taken
Allocator = Callable[[Sequence[LinearRecord], int, int], list[int]]


@dataclass(frozen=True)
class Row:
    """One allocation of one target."""

    target: float
    name: str
    bpw: float
    predicted: float
    found: Divergence

    def __str__(self) -> str:
        kl = f"{self.found.kl_mean:.5f} ± {self.found.kl_se:.5f}"
        return (
            f"| {self.target:g} | {self.name} | {self.bpw:.4f} | {kl} | {self.found.perplexity:.3f} "
            f"| {100 * self.found.top1_agreement:.2f} % | {self.predicted:.5f} |"
        )


def uniform(linears: Sequence[LinearRecord], budget_bits: int, seed: int) -> list[int]:
    """The same option everywhere, and the next better one at some linears; indices into the options."""
    front = _front(linears)
    total = {desc: sum(_named(linear, desc).total_bits for linear in linears) for desc in front}
    low = max((desc for desc in front if total[desc] <= budget_bits), key=lambda desc: total[desc])
    following = front[front.index(low) + 1 :]
    chosen, spare = dict.fromkeys(range(len(linears)), low), budget_bits - total[low]
    for at in sorted(chosen, key=lambda i: i * GOLDEN % 1):
        for high in following[:1]:
            more = _named(linears[at], high).total_bits - _named(linears[at], low).total_bits
            if more <= spare:
                chosen[at], spare = high, spare - more
    return [linear.options.index(_named(linear, chosen[at])) for at, linear in enumerate(linears)]


def _front(linears: Sequence[LinearRecord]) -> list[str]:
    """The options that all linears have, without those that take more bits than one of less error."""
    descs = [o.desc for o in linears[0].options if all(_holds(linear, o.desc) for linear in linears)]
    figures = {
        desc: tuple(sum(f) for f in zip(*((o.total_bits, o.err) for o in found), strict=True))
        for desc in descs
        for found in [[_named(linear, desc) for linear in linears]]
    }
    front: list[str] = []
    for desc in sorted(descs, key=lambda desc: figures[desc]):
        if not front or figures[desc][1] < figures[front[-1]][1]:
            front.append(desc)
    return front


def _holds(linear: LinearRecord, desc: str) -> bool:
    return any(option.desc == desc for option in linear.options)


def _named(linear: LinearRecord, desc: str) -> OptionRecord:
    return next(option for option in linear.options if option.desc == desc)


def annealed(linears: Sequence[LinearRecord], budget_bits: int, seed: int) -> list[int]:
    """What the annealer makes of ‖ΔW x‖ / ‖W x‖ of each linear."""
    slots = [[(float(o.total_bits), math.sqrt(o.err)) for o in linear.options] for linear in linears]
    return anneal(slots, budget_bits, seed)


OTHERS: Mapping[str, Allocator] = {"uniform": uniform, "annealed": annealed}


def main() -> int:
    """Prints the table; exit code 1 if ours is not the best everywhere."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("-c", "--calibration", type=Path)
    parser.add_argument(
        "-e", "--evaluation", type=Path, help="where not given, the calibration's held-out rows"
    )
    parser.add_argument("--format", choices=list(CODECS), default="exl2")
    parser.add_argument("--bits", type=float, nargs="+")
    parser.add_argument("--chunks", type=int)
    parser.add_argument("--rows", type=int, help="of the calibration, for the rounding; as a conversion's")
    parser.add_argument("--seed", type=int, default=0, help="of the annealer")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print("| target | allocation | bpw | KL divergence | perplexity | same best token | predicted KL |")
    print("|--:|---|--:|--:|--:|--:|--:|")
    good = True
    with tempfile.TemporaryDirectory(prefix="exlq-bench-") as scratch:
        for bits in arguments.bits or TARGETS[arguments.format]:
            rows = rows_of(arguments, bits, Path(scratch))
            print(*rows, sep="\n", flush=True)
            good = good and min(rows, key=lambda row: row.found.kl_mean).name == "ours"
    return int(not good)


def rows_of(arguments: argparse.Namespace, bits: float, scratch: Path) -> list[Row]:
    """All allocations of one target, each quantized and evaluated."""
    config = ConvertConfig(
        in_dir=arguments.model,
        out_dir=scratch / "out",
        calibration=arguments.calibration,
        bits=bits,
        rows=arguments.rows,
        formats=(arguments.format,),
        measure=(arguments.format,),
    )
    plan = make_plan(config)
    output = make_outputs(plan)[0][0]
    record = measured.measured(plan, _made(scratch / "work"), machine(), silent)
    keys = [spec.key for spec in plan.linears]
    linears = list(records(plan, output.codec, record, keys).values())
    choices = {name: other(linears, int(bits * plan.numel), arguments.seed) for name, other in OTHERS.items()}
    ours = output.allocate(record)
    if arguments.evaluation is None:
        chunks = plan.checked_rows()[0][: arguments.chunks]
    else:
        context = min(CONTEXT, plan.model.max_length)
        tokenizer = load_tokenizer(arguments.model)
        chunks = evaluation_chunks(arguments.evaluation, tokenizer, context, arguments.chunks)
    workspace, rows = Workspace(scratch), []
    with against(Blockwise(plan.model, workspace, "base"), chunks) as compared:
        for name in (*OTHERS, "ours"):
            choice = _changed(ours, linears, choices[name], record, plan.numel) if name in choices else ours
            found = _written(output, choice, scratch, workspace, compared)
            rows.append(Row(bits, name, choice.bpw, choice.loss or 0.0, found))
    return rows


def _changed(
    choice: Choice, linears: Sequence[LinearRecord], indices: Sequence[int], record: Measurement, numel: int
) -> Choice:
    """The choice with other options of the decoder's linears."""
    picked = {linear.key: linear.options[i] for linear, i in zip(linears, indices, strict=True)}
    options = {**choice.options, **{key: Option(o.desc, o.qparams) for key, o in picked.items()}}
    loss = math.fsum(measured_loss(record, key, option) or 0.0 for key, option in options.items())
    bpw = sum(option.total_bits for option in picked.values()) / numel
    return replace(choice, options=options, bpw=bpw, loss=loss, allocation=None)


def _written(
    output: Output,
    choice: Choice,
    scratch: Path,
    workspace: Workspace,
    compared: Callable[[Predictor], Divergence],
) -> Divergence:
    """Quantized by the second pass as any conversion is, and compared."""
    with tempfile.TemporaryDirectory(dir=scratch) as directory:
        output.write(choice, Path(directory), scratch / "work", silent)
        return compared(Blockwise(output.opened(Path(directory)), workspace, "other"))


def _made(directory: Path) -> Path:
    directory.mkdir(exist_ok=True)
    return directory


if __name__ == "__main__":
    sys.exit(main())
