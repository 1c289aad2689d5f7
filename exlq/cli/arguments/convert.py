"""`exlq convert`: a model, a text and a target in, a quantized model out."""

from __future__ import annotations

import argparse
from pathlib import Path

from exlq.cli.arguments.shared import arrange_calibration, arrange_machine
from exlq.names import FORMATS, HEAD_BITS, OBJECTIVES, STATES
from exlq.sizing.effort import EFFORTS, NORMAL

AUTO = "auto"
SUMMARY = "Quantize a model to a target size: EXL2 and GGUF."
EXAMPLES = (
    "exlq convert -i MODEL -o OUT -b 5.0",
    "exlq convert -i MODEL -o OUT -b 4.25 -c text.parquet --format exl2",
    "exlq convert -i MODEL -o OUT -b auto --memory 16GiB --context 8192",
    "exlq convert -i MODEL -o OUT --file-size 4.2GiB",
    "exlq convert -i MODEL -o OUT --gguf-type Q4_K_M",
    "exlq convert -i MODEL -o OUT -om measurement.json    # measure once,",
    "exlq convert -i MODEL -o OUT-4 -b 4 -m measurement.json    # then make any size",
    "exlq convert -i MODEL -o OUT -b 4 --threads 4 --workers 3    # 16 cores: this process and three more",
)


def arrange(parser: argparse.ArgumentParser) -> None:
    _arrange_places(parser.add_argument_group("model and result"))
    _arrange_target(parser.add_argument_group("target, one of the first four"))
    arrange_calibration(parser.add_argument_group("calibration"))
    _arrange_measurement(parser.add_argument_group("measuring"))
    _arrange_gguf(parser.add_argument_group("GGUF"))
    machine = parser.add_argument_group("machine and job")
    arrange_machine(machine, several=", or several GPUs as cuda:0,cuda:1")
    machine.add_argument("--profile", action="store_true", help="print where the time went")
    machine.add_argument(
        "--workers",
        metavar="WHERE",
        help="share the work with N processes of this machine, with the Ray cluster it has joined (ray), or "
        "with one at ray://HOST:PORT; wants exlq[ray]",
    )


def _arrange_places(group: argparse._ArgumentGroup) -> None:
    add, formats = group.add_argument, ", ".join(FORMATS)
    add("-i", "--in_dir", type=Path, required=True, metavar="DIR", help="Hugging Face model directory")
    add("-o", "--out_dir", type=Path, required=True, metavar="DIR", help="job directory")
    add("--format", metavar="LIST", help=f"comma list of {formats}; default: all that can be made")
    add("-cf", "--compile_full", type=Path, metavar="DIR", help="put the model there instead of OUT/exl2")
    add("-ss", "--shard_size", type=int, default=8192, metavar="MIB", help="largest file, 0 for one; 8192")
    add("--dry-run", action="store_true", help="print types and sizes, do nothing")
    add("-nr", "--no_resume", action="store_true", help="begin anew; the old work stays beside")
    add("--clean", action="store_true", help="keep nothing in OUT/work for another run")
    add("--allow-other-machine", action="store_true", help="go on with other threads or another device")


def _arrange_target(group: argparse._ArgumentGroup) -> None:
    add, heads = group.add_argument, ", ".join(map(str, HEAD_BITS))
    add("-b", "--bits", type=_bits, metavar="BITS", help="bits per weight of the decoder's linears, or auto")
    add("--file-size", metavar="SIZE", help="most bytes of the GGUF file, as 4.2GiB; all shards")
    add("--gguf-type", metavar="NAME", help="a recipe of llama-quantize, as Q4_K_M")
    add("--recipe", type=Path, metavar="FILE", help="a recipe of exlq solve, for the formats it has")
    add("-hb", "--head_bits", type=int, default=6, help=f"bits of lm_head: {heads}; default 6")
    add("--memory", metavar="SIZE", help="with -b auto: the most bits that run in so much, as 16GiB")
    add("--context", type=int, metavar="N", help="with -b auto: tokens to run; default 8192 or the maximum")
    add(
        "--objective",
        choices=OBJECTIVES,
        default="kl",
        help="what the mix is to keep small: the predicted KL divergence, or the linears' relative output "
        "errors, which takes no gradients",
    )
    add("--permute-mlp", action="store_true", help="reorder channels inside MLPs and heads to fit the blocks")


def _bits(text: str) -> float | str:
    try:
        return text if text == AUTO else float(text)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of bits; give one, or auto") from exc


def _arrange_measurement(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--effort", choices=EFFORTS, default=NORMAL, help="rows of text, where they are not given; normal")
    add("-om", "--output_measurement", type=Path, metavar="FILE", help="measure only, and save it there")
    add("-m", "--measurement", type=Path, metavar="FILE", help="take this measurement, measure nothing")
    add("--force-measurement", action="store_true", help="take -m's file even if measured otherwise")
    add("--measure", metavar="LIST", help=f"measure only the options of {', '.join(FORMATS)}; default both")
    add("-mr", "--measurement_rows", type=int, metavar="N", help="rows to measure on; default 32,768 tokens")
    add("-ml", "--measurement_length", type=int, metavar="N", help="tokens in a row to measure on")
    add(
        "--random-rows",
        type=float,
        default=0.25,
        metavar="SHARE",
        help="rows of random tokens to quantize on, for each row of text; default 0.25",
    )
    add("--states", choices=STATES, default="float32", help="how hidden states are kept; default float32")


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
