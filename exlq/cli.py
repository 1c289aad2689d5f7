"""The command line: arguments, progress, exit codes. The only place that prints."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from exlq import __doc__ as summary_of_exlq
from exlq import __version__
from exlq.calibration.rows import STARTS
from exlq.errors import ConfigError, ExlqError, InputError
from exlq.evaluate.run import evaluate
from exlq.formats import CODECS
from exlq.formats.exl2_options import HEAD_BITS
from exlq.pipeline import job
from exlq.pipeline.config import STATES, ConvertConfig
from exlq.pipeline.estimate import estimate
from exlq.report import tables

console = Console(soft_wrap=True)
errors = Console(stderr=True, soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """`exlq COMMAND …`; the exit code: 0 done, 1 the work failed, 2 the input cannot be used."""
    parser = argparse.ArgumentParser(prog="exlq", description=summary_of_exlq)
    parser.add_argument("--version", action="version", version=f"exlq {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (summary, arrange, run) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        arrange(command)
        command.set_defaults(run=run)
    return _run(parser.parse_args(arguments))


def convert_main() -> int:
    """`python scripts/convert.py …`: the `convert` command alone."""
    return main(["convert", *sys.argv[1:]])


def _run(parsed: argparse.Namespace) -> int:
    _quiet_libraries()
    try:
        if parsed.threads is not None:
            if parsed.threads < 1:
                raise ConfigError(f"--threads {parsed.threads}: at least 1 is wanted")
            torch.set_num_threads(parsed.threads)
        parsed.run(parsed)
    except ExlqError as exc:
        _fail(str(exc))
        return 2 if isinstance(exc, InputError) else 1
    except OSError as exc:
        _fail(f"{exc.filename or 'a file'}: {exc.strerror or exc}")
        return 1
    except KeyboardInterrupt:
        _fail("interrupted; the same command goes on where it can")
        return 130
    return 0


def _fail(message: str) -> None:
    errors.print(f"error: {' '.join(message.split())}", markup=False, highlight=False)


def _quiet_libraries() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    logging.getLogger("transformers").setLevel(logging.ERROR)


def _arrange_convert(parser: argparse.ArgumentParser) -> None:
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
    _arrange_machine(parser)


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


def _arrange_eval(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", type=Path, help="EXL2 or Hugging Face model directory")
    add("--base", type=Path, required=True, metavar="DIR", help="the model it was made of")
    add("-c", "--cal_dataset", type=Path, required=True, metavar="FILE", help="parquet file of text")
    add("--ctx", type=int, metavar="N", help="tokens in a chunk; default 512 or the model's maximum")
    add("--chunks", type=int, metavar="N", help="chunks at most; default all")
    add("--text-column", metavar="NAME", help="column to read; default text, messages or input_ids")
    add("--json", action="store_true", help="print JSON instead of a table")
    _arrange_machine(parser)


def _arrange_machine(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--seed", type=int, default=0, help="of everything drawn by lot; default 0")
    add("--threads", type=int, metavar="N", help="threads of the arithmetic; default torch's")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, mps; default cpu")


def _convert(parsed: argparse.Namespace) -> None:
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
    started = job.begin(config, _progress, shlex.join(sys.argv))
    console.print(tables.plan_table(started.plan, estimate(started.plan)))
    summary = job.run(started)
    if summary is None:
        console.print(f"measurement: {config.output_measurement}")
    else:
        console.print(tables.summary_table(summary))


def _eval(parsed: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(prefix="exlq-eval-", ignore_cleanup_errors=True) as scratch:
        found = evaluate(
            parsed.model,
            parsed.base,
            parsed.cal_dataset,
            Path(scratch),
            context=parsed.ctx,
            max_chunks=parsed.chunks,
            text_column=parsed.text_column,
            device=parsed.device,
        )
    if parsed.json:
        figures = {"model": str(parsed.model), "base": str(parsed.base), "text": str(parsed.cal_dataset)}
        print(json.dumps(figures | asdict(found) | {"protocol": tables.protocol(found)}, indent=1))
    else:
        console.print(tables.evaluation_table(str(parsed.model), found, parsed.cal_dataset))


def _progress(stage: str, done: int, total: int) -> None:
    console.print(f"{stage} {done}/{total}", highlight=False)


COMMANDS: dict[
    str, tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], None]]
] = {
    "convert": ("Quantize a model to an average of bits per weight.", _arrange_convert, _convert),
    "eval": ("Compare a model with the one it was made of.", _arrange_eval, _eval),
}
