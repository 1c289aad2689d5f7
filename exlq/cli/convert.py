"""`exlq convert`: a model, a text and a target in, a quantized model out."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from exlq.calibration.rows import STARTS
from exlq.cli.shared import arrange_machine, console, show_progress
from exlq.formats import CODECS
from exlq.formats.exl2_options import HEAD_BITS
from exlq.pipeline import job
from exlq.pipeline.config import STATES, ConvertConfig
from exlq.pipeline.estimate import estimate
from exlq.report import tables

SUMMARY = "Quantize a model to an average of bits per weight."


def arrange(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-i", "--in_dir", type=Path, required=True, metavar="DIR", help="Hugging Face model directory")
    add("-o", "--out_dir", type=Path, required=True, metavar="DIR", help="job directory")
    add("-b", "--bits", type=float, help="average bits per weight of the decoder's linears")
    heads = ", ".join(map(str, HEAD_BITS))
    add("-hb", "--head_bits", type=int, default=6, help=f"bits of lm_head: {heads}; default 6")
    add("--format", default="exl2", metavar="LIST", help=f"comma list of {', '.join(CODECS)}; default exl2")
    add("-ss", "--shard_size", type=int, default=8192, metavar="MIB", help="largest file, 0 for one; 8192")
    add("-cf", "--compile_full", type=Path, metavar="DIR", help="put the model there instead of OUT/exl2")
    add("-om", "--output_measurement", type=Path, metavar="FILE", help="measure only, and save it there")
    add("-m", "--measurement", type=Path, metavar="FILE", help="take this measurement, measure nothing")
    add("--force-measurement", action="store_true", help="take -m's file even if measured otherwise")
    add("-nr", "--no_resume", action="store_true", help="begin anew, whatever an earlier run has left")
    add("--states", choices=STATES, default="float32", help="how hidden states are kept; default float32")
    _arrange_calibration(parser)
    arrange_machine(parser)


def _arrange_calibration(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-c", "--cal_dataset", type=Path, metavar="FILE", help="parquet file of text; default: bundled")
    add("-r", "--dataset_rows", type=int, metavar="N", help="rows to quantize on; default 204,800 tokens")
    add("-l", "--length", type=int, metavar="N", help="tokens in a row; default 2048 or the model's maximum")
    add("-mr", "--measurement_rows", type=int, metavar="N", help="rows to measure on; default 32,768 tokens")
    add("-ml", "--measurement_length", type=int, metavar="N", help="tokens in a row to measure on")
    add("--rows", choices=tuple(STARTS), default="spread", help="rows from all over the text, or its first")
    add("--text-column", metavar="NAME", help="column to read; default text, messages or input_ids")
    add("--parse-special", action="store_true", help="let special tokens spelled out in text be special")


def run(parsed: argparse.Namespace) -> None:
    config = ConvertConfig(
        in_dir=parsed.in_dir,
        out_dir=parsed.out_dir,
        calibration=parsed.cal_dataset,
        bits=parsed.bits,
        head_bits=parsed.head_bits,
        shard_mib=parsed.shard_size,
        rows=parsed.dataset_rows,
        length=parsed.length,
        measurement_rows=parsed.measurement_rows,
        measurement_length=parsed.measurement_length,
        measurement=parsed.measurement,
        output_measurement=parsed.output_measurement,
        compile_full=parsed.compile_full,
        no_resume=parsed.no_resume,
        force_measurement=parsed.force_measurement,
        formats=tuple(name for name in parsed.format.split(",") if name),
        text_column=parsed.text_column,
        parse_special=parsed.parse_special,
        row_mode=parsed.rows,
        states=parsed.states,
        seed=parsed.seed,
        threads=parsed.threads,
        device=parsed.device,
    )
    done = job.finished_summary(config)
    if done is not None:
        console.print("This conversion is finished; -nr does it again.")
        console.print(tables.summary_table(done))
        return
    started = job.begin(config, show_progress, shlex.join(sys.argv))
    console.print(tables.plan_table(started.plan, estimate(started.plan)))
    summary = job.run(started)
    if summary is None:
        console.print(f"measurement: {config.output_measurement}")
    else:
        console.print(tables.summary_table(summary))
