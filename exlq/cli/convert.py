"""`exlq convert`: a model, a text and a target in, a quantized model out."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from exlq.cli.shared import arrange_calibration, arrange_machine, console, show_progress
from exlq.formats import CODECS
from exlq.formats.exl2_options import HEAD_BITS
from exlq.formats.gguf.overrides import read_type_file
from exlq.formats.gguf.recipes import recipe_named
from exlq.pipeline import job
from exlq.pipeline.config import OBJECTIVES, STATES, ConvertConfig
from exlq.pipeline.estimate import estimate
from exlq.report import tables
from exlq.sizes import parse_bytes

SUMMARY = "Quantize a model to an average of bits per weight."


def arrange(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-i", "--in_dir", type=Path, required=True, metavar="DIR", help="Hugging Face model directory")
    add("-o", "--out_dir", type=Path, required=True, metavar="DIR", help="job directory")
    add("-b", "--bits", type=float, help="target: average bits per weight of the decoder's linears")
    add("--file-size", metavar="SIZE", help="target: most bytes of the GGUF file, as 4.2GiB; all shards")
    add("--gguf-type", metavar="NAME", help="target: a recipe of llama-quantize, as Q4_K_M")
    heads = ", ".join(map(str, HEAD_BITS))
    add("-hb", "--head_bits", type=int, default=6, help=f"bits of lm_head: {heads}; default 6")
    formats = ", ".join(CODECS)
    add("--format", metavar="LIST", help=f"comma list of {formats}; default: all that can be made")
    add("-ss", "--shard_size", type=int, default=8192, metavar="MIB", help="largest file, 0 for one; 8192")
    add("-cf", "--compile_full", type=Path, metavar="DIR", help="put the model there instead of OUT/exl2")
    add("-om", "--output_measurement", type=Path, metavar="FILE", help="measure only, and save it there")
    add("-m", "--measurement", type=Path, metavar="FILE", help="take this measurement, measure nothing")
    add("--force-measurement", action="store_true", help="take -m's file even if measured otherwise")
    add("-nr", "--no_resume", action="store_true", help="begin anew, whatever an earlier run has left")
    add("--states", choices=STATES, default="float32", help="how hidden states are kept; default float32")
    add("--measure", metavar="LIST", help=f"measure only the options of {formats}; default both")
    add(
        "--random-rows",
        type=float,
        default=0.25,
        metavar="SHARE",
        help="rows of random tokens to quantize on, for each row of text; default 0.25",
    )
    add(
        "--objective",
        choices=OBJECTIVES,
        default="kl",
        help="what the mix is to keep small: the predicted KL divergence, or the linears' relative output "
        "errors, which takes no gradients",
    )
    add("--permute-mlp", action="store_true", help="reorder channels inside MLPs and heads to fit the blocks")
    add("--dry-run", action="store_true", help="print types and sizes, do nothing")
    _arrange_gguf(parser.add_argument_group("GGUF"))
    arrange_calibration(parser)
    _arrange_measurement(parser)
    arrange_machine(parser)


def _arrange_gguf(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--split-size", metavar="SIZE", help="largest file, as 2GiB; default one file")
    add(
        "--no-gptq", action="store_true", help="plain rounding weighted by the activations, no error feedback"
    )
    add("--unweighted", action="store_true", help="plain rounding without calibration; with --gguf-type")
    add("--tensor-type", action="append", default=[], metavar="REGEX=TYPE", help="types by hand; repeatable")
    add("--tensor-type-file", type=Path, metavar="FILE", help="such items from a file")
    add("--output-tensor-type", metavar="TYPE", help="type of output.weight")
    add("--token-embedding-type", metavar="TYPE", help="type of token_embd.weight")
    add("--tokenizer-pre", metavar="NAME", help="llama.cpp's name of the pre-tokenizer, if it is not known")
    add("--gguf-template", type=Path, metavar="FILE", help="take all but the weights from this GGUF")


def _arrange_measurement(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-mr", "--measurement_rows", type=int, metavar="N", help="rows to measure on; default 32,768 tokens")
    add("-ml", "--measurement_length", type=int, metavar="N", help="tokens in a row to measure on")


def run(parsed: argparse.Namespace) -> None:
    config = _config(parsed)
    if parsed.dry_run:
        _rehearse(config)
        return
    done = job.finished_summary(config)
    if done is not None:
        console.print("This conversion is finished; -nr does it again.")
        console.print(tables.summary_table(done))
        return
    started = job.begin(config, show_progress, shlex.join(sys.argv))
    console.print(
        tables.plan_table(
            started.plan, started.outputs, started.notes, estimate(started.plan, started.outputs)
        )
    )
    summary = job.run(started)
    if summary is None:
        console.print(f"measurement: {config.output_measurement}")
    else:
        console.print(tables.summary_table(summary))


def _rehearse(config: ConvertConfig) -> None:
    formats, notes = job.rehearse(config)
    for name, figures in formats.items():
        if "types" in figures:
            rows = [
                (tensor, kind, figures["tensor_bytes"][tensor]) for tensor, kind in figures["types"].items()
            ]
            console.print(tables.types_table(rows, figures["file_bytes"]))
        told = ""
        if figures["predicted_kl"] is not None:
            told = f", predicted KL divergence {figures['predicted_kl']:.5f} ± {figures['predicted_se']:.5f}"
        console.print(f"{name}: {figures['bpw']:.4f} bits per weight{told}")
    for note in notes:
        console.print(note, markup=False)


def _config(parsed: argparse.Namespace) -> ConvertConfig:
    return ConvertConfig(
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
        formats=_names(parsed.format),
        measure=_names(parsed.measure),
        file_size=None if parsed.file_size is None else parse_bytes(parsed.file_size),
        gguf_type=None if parsed.gguf_type is None else recipe_named(parsed.gguf_type).name,
        gptq=not (parsed.no_gptq or parsed.unweighted),
        weighted=not parsed.unweighted,
        tensor_types=(*parsed.tensor_type, *_type_file(parsed.tensor_type_file)),
        output_tensor_type=parsed.output_tensor_type,
        token_embedding_type=parsed.token_embedding_type,
        split_bytes=None if parsed.split_size is None else parse_bytes(parsed.split_size),
        tokenizer_pre=parsed.tokenizer_pre,
        gguf_template=parsed.gguf_template,
        text_column=parsed.text_column,
        parse_special=parsed.parse_special,
        row_mode=parsed.rows,
        random_share=parsed.random_rows,
        states=parsed.states,
        seed=parsed.seed,
        threads=parsed.threads,
        device=parsed.device,
        objective=parsed.objective,
        permute_mlp=parsed.permute_mlp,
    )


def _names(listed: str | None) -> tuple[str, ...] | None:
    return None if listed is None else tuple(name for name in listed.split(",") if name)


def _type_file(path: Path | None) -> list[str]:
    return [] if path is None else read_type_file(path)
