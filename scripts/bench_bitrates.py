"""Perplexity and KL divergence by bits per weight, as a table for the README.

Usage: python scripts/bench_bitrates.py MODEL [-c CALIBRATION.parquet] [-e EVALUATION.parquet]
           [--format exl2] [--bits 2.5 3.0 4.0 5.0 6.0] [--chunks N] [--threads N]

The model is measured once and quantized for every target. Without -e the figures are those of the
conversion itself: the held-out rows of the calibration text.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from exlq.evaluation.run import evaluate
from exlq.formats.codecs import CODECS
from exlq.pipeline import job
from exlq.pipeline.config import ConvertConfig


def main() -> int:
    """Prints the table; exit code 1 if the KL divergence rises anywhere with the bits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("-c", "--calibration", type=Path)
    parser.add_argument("-e", "--evaluation", type=Path)
    parser.add_argument("--format", choices=list(CODECS), default="exl2")
    parser.add_argument("--bits", type=float, nargs="+", default=[2.5, 3.0, 4.0, 5.0, 6.0])
    parser.add_argument("--chunks", type=int)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory(prefix="exlq-bench-") as scratch:
        rows = [figures(arguments, bits, Path(scratch)) for bits in sorted(arguments.bits)]
    print_table(rows)
    divergences = [row["kl_mean"] for row in rows]
    return int(divergences != sorted(divergences, reverse=True))


def figures(arguments: argparse.Namespace, bits: float, scratch: Path) -> dict[str, Any]:
    """Converts for one target, and evaluates the result."""
    out = scratch / f"{bits:g}"
    measured = scratch / "measurement.json"
    config = ConvertConfig(
        in_dir=arguments.model,
        out_dir=out,
        calibration=arguments.calibration,
        bits=bits,
        formats=(arguments.format,),
        measure=(arguments.format,),
        measurement=measured if measured.exists() else None,
    )
    summary = job.run(job.begin(config, told, " ".join(sys.argv)))
    assert summary is not None
    (out / "measurement.json").replace(measured)
    result: dict[str, Any] = summary["outputs"][arguments.format]
    found: Mapping[str, Any] = result["evaluation"]
    if arguments.evaluation is not None:
        (work := out / "evaluation").mkdir()
        text, chunks = arguments.evaluation, arguments.chunks
        found = asdict(evaluate(Path(result["paths"][0]), arguments.model, text, work, max_chunks=chunks))
    size = result["bytes"]
    return {**found, "bpw": result["bpw"], "bytes": size, "predicted": result["predicted_kl"]}


def told(stage: str, done: int, total: int) -> None:
    """One line per finished stage, on stderr."""
    if done == total:
        print(f"{stage} done", file=sys.stderr, flush=True)


def print_table(rows: list[dict[str, Any]]) -> None:
    """Markdown."""
    base = rows[0]["perplexity_base"]
    print(f"base perplexity {base:.3f}, {rows[0]['n_tokens']:,} tokens scored")
    print("| bpw | file, MB | perplexity | KL divergence | KL, 99 % | same best token | predicted KL |")
    print("|--:|--:|--:|--:|--:|--:|--:|")
    for row in rows:
        print(
            f"| {row['bpw']:.4f} | {row['bytes'] / 1e6:.2f} | {row['perplexity']:.3f} | {row['kl_mean']:.5f} "
            f"± {row['kl_se']:.5f} | {row['kl_p99']:.4f} | {100 * row['top1_agreement']:.2f} % "
            f"| {row['predicted']:.5f} |"
        )


if __name__ == "__main__":
    sys.exit(main())
