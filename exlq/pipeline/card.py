"""The model card: the README.md beside every model that is made."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exlq import __version__
from exlq.evaluation.divergence import Divergence
from exlq.pipeline.config import ConvertConfig
from exlq.pipeline.plan import Plan

CARD = "README.md"
FIELDS = ("license", "license_name", "license_link", "language", "pipeline_tag")  # taken over from the base
FRONT = re.compile(r"\A---\r?\n(.*?)\r?\n---\s*$", re.DOTALL | re.MULTILINE)
LARGEST = 1 << 20  # characters of a base's card that are looked at


def model_card(plan: Plan, kind: str, file: str, result: Mapping[str, Any]) -> str:
    """Markdown with the front matter that model hubs read; nothing of the machine, the day or a path.

    Args:
        kind: of `CODECS`.
        file: what is to be run: the name of the GGUF file, or of the directory.
        result: what the summary says of this output: bpw, evaluation, allocation, notes …
    """
    found = Divergence(**result["evaluation"])
    base = plan.config.in_dir.resolve().name
    lines = [
        "---",
        *_front(plan.config.in_dir, base, kind),
        "---",
        "",
        f"# {base}, {TITLES[kind]} at {result['bpw']:.2f} bits per weight",
        "",
        f"Quantized from `{base}` by exlq {__version__}: {_target(plan.config)}.",
        "",
        "| | base | this model |",
        "|---|--:|--:|",
        f"| perplexity | {found.perplexity_base:.4f} | {found.perplexity:.4f} |",
        f"| KL divergence, nats per token | 0 | {found.kl_mean:.5f} ± {found.kl_se:.5f} |",
        f"| same best token | 100 % | {100 * found.top1_agreement:.2f} % |",
        "",
        f"Compared on {found.n_tokens:,} tokens held out of the calibration.{_predicted(result)}",
        "",
        "## How to run it",
        "",
        *(f"    {line.format(file=file)}" for line in RUNS[kind]),
        "",
        "## How it was made",
        "",
        f"- Options of the {len(result['allocation'])} matrices: {_mix(result['allocation'])}",
        f"- Calibration: {_calibration(plan)}",
        f"- Rounding: {plan.config.rounding}; the mix is {_mix_source(plan.config)}",
        *(f"- Note: {note}" for note in result["notes"]),
    ]
    return "\n".join(lines) + "\n"


def _front(directory: Path, base: str, kind: str) -> list[str]:
    """The YAML lines: what the base's card says of its licence, and what this is."""
    taken = _base_fields(directory)
    return [*(f"{key}: {value}" for key, value in taken.items()), f'base_model: "{base}"', *TAGS[kind]]


def _base_fields(directory: Path) -> dict[str, str]:
    """Values on one line of the base's own front matter."""
    try:
        text = (directory / CARD).read_text(encoding="utf-8")[:LARGEST]
    except (OSError, UnicodeDecodeError):
        return {}
    found = FRONT.match(text)
    pairs = (line.partition(":") for line in (found[1].splitlines() if found else ()))
    return {key: value.strip() for key, _, value in pairs if key in FIELDS and value.strip()}


def _target(config: ConvertConfig) -> str:
    return " ".join(f"`{flag} {value}`" for flag, value in config.targets.items())


def _predicted(result: Mapping[str, Any]) -> str:
    if result["predicted_kl"] is None:
        return ""
    return f" Predicted were {result['predicted_kl']:.5f} ± {result['predicted_se']:.5f}."


def _mix(allocation: Mapping[str, str]) -> str:
    return ", ".join(f"{desc} ({count})" for desc, count in Counter(allocation.values()).most_common())


def _calibration(plan: Plan) -> str:
    if not plan.config.weighted:
        return "none"
    record = plan.rows.record
    return f"`{record.file}` (sha256 {record.sha256}), {record.rows} rows of {record.row_length} tokens"


def _mix_source(config: ConvertConfig) -> str:
    if config.gguf_type is not None:
        return f"llama-quantize's for {config.gguf_type}"
    if config.recipe is not None:
        return "a given recipe"
    least = "predicted KL divergence" if config.objective == "kl" else "relative output error"
    return f"that of the least {least} within the target"


TITLES: Mapping[str, str] = {"exl2": "EXL2", "gguf": "GGUF"}
TAGS: Mapping[str, tuple[str, ...]] = {
    "exl2": ("base_model_relation: quantized", "tags: [exl2, exlq]"),
    "gguf": ("base_model_relation: quantized", "tags: [gguf, exlq]"),
}
RUNS: Mapping[str, tuple[str, ...]] = {
    "exl2": (
        "exlq run {file} -p PROMPT    # CPU or GPU, through transformers",
        "# on GPUs also in ExLlamaV2, TabbyAPI and text-generation-webui",
    ),
    "gguf": (
        "exlq run {file} -p PROMPT",
        "llama-cli -m {file} -p PROMPT    # llama.cpp; also LM Studio, Ollama, KoboldCpp",
    ),
}
