"""Tables of evaluations, for a terminal, and the words that say how they were made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import ascii_lowercase

from rich.table import Table

from exlq.evaluation.divergence import Divergence
from exlq.evaluation.run import Evaluation, Settings
from exlq.names import LLAMA_CPP, TORCH
from exlq.report.pairs import pairs

COLUMNS = ("bytes", "=", "perplexity", "KL divergence, mean", "median", "99 %", "same best token")


def evaluation_table(evaluation: Evaluation, text: Path, settings: Settings) -> Table:
    """Figures of one model against its base, and the protocol they were taken by."""
    found = evaluation.found
    return pairs(
        f"{evaluation.model} on {text.name}",
        [
            ("bytes", f"{evaluation.n_bytes:,}"),
            ("perplexity", f"{found.perplexity:.4f}"),
            ("perplexity of the base", f"{found.perplexity_base:.4f}"),
            ("KL divergence, mean", _mean(found)),
            ("KL divergence, median", f"{found.kl_median:.6f}"),
            ("KL divergence, 99 %", f"{found.kl_p99:.6f}"),
            ("same best token", _best(found)),
            ("noise floor of the KL", f"{found.noise_floor:.1e}"),
            ("protocol", protocol(found, settings)),
        ],
    )


def comparison_table(evaluations: Sequence[Evaluation], text: Path, settings: Settings) -> Table:
    """One row per model, all against one base; files of equal size carry the same letter."""
    found = evaluations[0].found
    built = Table(title=f"on {text.name}", title_justify="left", caption_justify="left")
    built.add_column("model", overflow="fold", style="bold")
    for name in COLUMNS:
        built.add_column(name, justify="right")
    letters = _letters([evaluation.n_bytes for evaluation in evaluations])
    for evaluation in evaluations:
        built.add_row(str(evaluation.model), *_cells(evaluation, letters))
    built.caption = (
        f"perplexity of the base {found.perplexity_base:.4f}, noise floor of the KL {found.noise_floor:.1e}; "
        f"{'files with the same letter under = have equal bytes; ' if letters else ''}"
        f"{protocol(found, settings)}"
    )
    return built


def protocol(found: Divergence, settings: Settings) -> str:
    """How an evaluation was made, in words."""
    return (
        f"{found.n_chunks} chunks of {found.context} tokens, each alone and opened by BOS where the "
        f"tokenizer adds one, second half scored ({found.n_tokens:,} tokens), as llama-perplexity; "
        f"{RUNTIME_WORDS[settings.runtime, settings.weights_only]}"
    )


def _cells(evaluation: Evaluation, letters: Mapping[int, str]) -> tuple[str, ...]:
    found = evaluation.found
    return (
        f"{evaluation.n_bytes:,}",
        letters.get(evaluation.n_bytes, ""),
        f"{found.perplexity:.4f}",
        _mean(found),
        f"{found.kl_median:.6f}",
        f"{found.kl_p99:.6f}",
        _best(found),
    )


def _letters(sizes: Sequence[int]) -> dict[int, str]:
    """A letter for every size that occurs more than once: a to z, then numbers."""
    equal = [size for size, count in Counter(sizes).items() if count > 1]
    return {size: ascii_lowercase[i] if i < len(ascii_lowercase) else str(i) for i, size in enumerate(equal)}


def _mean(found: Divergence) -> str:
    return f"{found.kl_mean:.6f} ± {found.kl_se:.6f}"


def _best(found: Divergence) -> str:
    return f"{100 * found.top1_agreement:.3f} %"


RUNTIME_WORDS: dict[tuple[str, bool], str] = {
    (TORCH, False): "all in float32 by torch",
    (LLAMA_CPP, False): (
        "GGUF files by llama.cpp's CPU kernels, which round activations too where weights are quantized, "
        "keys and values cached in float32"
    ),
    (LLAMA_CPP, True): "GGUF files dequantized to float32 and run by llama.cpp",
}
