"""Compares the logits of the real ExLlamaV2 0.3.2 with those of this package's own reader.

Usage, on a machine with an NVIDIA GPU, exllamav2 0.3.2 and this package:
    python scripts/check_exllamav2.py out/exl2 -c text.parquet

Both open the same EXL2 directory: ExLlamaV2 with its kernels in float16, this package by
dequantizing every linear and running transformers in float32. Exit code 0: they agree; 1: they do
not; 2: they could not be compared, and a line says why.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from exlq.calibration import evaluation_chunks, load_tokenizer
from exlq.errors import ExlqError
from exlq.formats.exl2_directory import Exl2Weights
from exlq.models.model import Model
from exlq.models.open import open_model

WANTED_VERSION = "0.3.2"
MOST_KL = 2e-3  # nats, mean; float16 kernels stay well below
LEAST_AGREEMENT = 0.98  # of the likeliest token


class Figures(NamedTuple):
    """How far two models' logits are apart over all positions of some rows."""

    positions: int
    largest: float
    rms: float
    rms_of_logits: float
    kl: float
    agreement: float

    @property
    def agree(self) -> bool:
        return self.kl <= MOST_KL and self.agreement >= LEAST_AGREEMENT


def main() -> int:
    arguments = _arguments()
    missing = _missing()
    if missing:
        print(f"not compared: {missing}")
        return 2
    try:
        rows = _rows(arguments)
        ours = list(our_logits(arguments.model, rows, torch.device("cuda:0")))
        found = figures(ours, exllamav2_logits(arguments.model, rows))
    except ExlqError as exc:
        print(f"not compared: {exc}")
        return 2
    print(f"GPU                        {torch.cuda.get_device_name(0)}")
    print(f"rows × tokens              {rows.shape[0]} × {rows.shape[1]}")
    print(f"largest difference         {found.largest:.5f}")
    print(f"rms difference             {found.rms:.6f}   (rms of the logits {found.rms_of_logits:.4f})")
    print(f"mean KL divergence         {found.kl:.3e}   (at most {MOST_KL:.0e})")
    print(f"same likeliest token       {found.agreement:.4%}   (at least {LEAST_AGREEMENT:.0%})")
    print("verdict                    " + ("they agree" if found.agree else "THEY DO NOT AGREE"))
    return 0 if found.agree else 1


def our_logits(directory: Path, rows: Tensor, device: torch.device) -> Iterator[Tensor]:
    """(length, vocab) float32 logits of each row, on the CPU, from this package's reader."""
    model: Model = open_model(directory, Exl2Weights(directory), device=device)
    hidden = model.embed(rows)
    for index in range(model.n_blocks):
        with model.block(index) as block:
            hidden = torch.cat([block.forward(row.unsqueeze(0)).to(hidden) for row in hidden])
    for row in hidden:
        yield model.logits(model.final_norm(row.to(device))).float().cpu()


def exllamav2_logits(directory: Path, rows: Tensor) -> Iterator[Tensor]:
    """(length, vocab) float32 logits of each row, on the CPU, from ExLlamaV2.

    Its `max_seq_len` is left as config.json gives it, for its rope depends on that.
    """
    from exllamav2 import ExLlamaV2, ExLlamaV2Cache, ExLlamaV2Config

    config = ExLlamaV2Config(str(directory))
    config.arch_compat_overrides()
    model = ExLlamaV2(config)
    model.load()
    cache = ExLlamaV2Cache(model, max_seq_len=rows.shape[1])
    for row in rows:
        cache.current_seq_len = 0
        logits = model.forward(row.unsqueeze(0), cache)
        yield logits[0, :, : config.vocab_size].float().cpu()


def figures(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> Figures:
    """Differences of logits, (length, vocab) each; the divergence is of `theirs` from `ours`."""
    squares = wanted_squares = divergence = 0.0
    largest, same, positions, values = 0.0, 0, 0, 0
    for wanted, found in zip(ours, theirs, strict=True):
        difference = (found - wanted).double()
        squares += difference.square().sum().item()
        wanted_squares += wanted.double().square().sum().item()
        largest = max(largest, difference.abs().max().item())
        expected, actual = wanted.double().log_softmax(-1), found.double().log_softmax(-1)
        divergence += (expected.exp() * (expected - actual)).sum().item()
        same += int((wanted.argmax(-1) == found.argmax(-1)).sum())
        positions += len(wanted)
        values += wanted.numel()
    rms, rms_of_logits = (squares / values) ** 0.5, (wanted_squares / values) ** 0.5
    return Figures(positions, largest, rms, rms_of_logits, divergence / positions, same / positions)


def _rows(arguments: argparse.Namespace) -> Tensor:
    """(rows, length) int64, of a parquet file or at random."""
    if arguments.calibration:
        tokenizer = load_tokenizer(arguments.model)
        return evaluation_chunks(arguments.calibration, tokenizer, arguments.length, arguments.rows)
    vocabulary = Exl2Weights(arguments.model).shape("model.embed_tokens.weight")[0]
    generator = torch.Generator().manual_seed(arguments.seed)
    return torch.randint(vocabulary, (arguments.rows, arguments.length), generator=generator)


def _missing() -> str | None:
    """What this machine lacks for the comparison, in one sentence."""
    if importlib.util.find_spec("exllamav2") is None:
        return f"the package exllamav2 is not installed; wanted version {WANTED_VERSION}"
    version = importlib.metadata.version("exllamav2").partition("+")[0]
    if version != WANTED_VERSION:
        return f"exllamav2 {version} is installed; wanted {WANTED_VERSION}"
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return "torch finds no NVIDIA GPU; ExLlamaV2 runs on nothing else"
    return None


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare ExLlamaV2's logits with this package's own.")
    parser.add_argument("model", type=Path, help="EXL2 directory")
    parser.add_argument("-c", "--calibration", type=Path, help="parquet file of text; random tokens without")
    parser.add_argument("-r", "--rows", type=int, default=8)
    parser.add_argument("-l", "--length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0, help="of the random tokens")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
