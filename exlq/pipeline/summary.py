"""What a conversion's summary is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from exlq.doctor import diagnose
from exlq.errors import InputError
from exlq.evaluation.divergence import Divergence
from exlq.pipeline.allocate import Choice
from exlq.pipeline.config import ConvertConfig
from exlq.pipeline.output import Output
from exlq.recipes.prediction import predicted

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


def foretold_kl(config: ConvertConfig, choice: Choice) -> dict[str, float | None]:
    """The expected KL divergence and its standard error, None where nothing was measured."""
    found = predicted(choice.loss, config.corrects)
    if found is None:
        return {"predicted_kl": None, "predicted_se": None}
    return {"predicted_kl": found.kl, "predicted_se": found.se}


def figures_of(
    output: Output, choice: Choice, divergence: Divergence, remarks: Sequence[str]
) -> dict[str, Any]:
    """What the summary says of one output that was compared with the base."""
    solution = choice.allocation
    return {
        "bpw": choice.bpw,
        "optimality_gap": None if solution is None else solution.gap,
        "evaluation": asdict(divergence),
        "notes": (*choice.notes, *remarks),
        **output.figures(choice),
        "allocation": {key: option.desc for key, option in choice.options.items()},
    }


def text_found(config: ConvertConfig) -> dict[str, Any] | None:
    """What `exlq doctor` finds in the text, tokens apart; None where it can say nothing."""
    try:
        found = diagnose(
            config.calibration,
            text_column=config.text_column,
            parse_special=config.parse_special,
            seed=config.seed,
        )
    except InputError:
        return None
    return asdict(found)


def target_name(config: ConvertConfig, output: Output) -> str:
    """What an evaluation is filed under in the measurement."""
    target = " ".join(f"{flag} {value}" for flag, value in config.targets.items())
    return f"{output.name} {target} -hb {config.head_bits}"


def weight_bytes(path: Path) -> int:
    """Bytes of the weights in a directory, or of a file."""
    if path.is_file():
        return path.stat().st_size if path.suffix == ".gguf" else 0
    return sum(file.stat().st_size for file in path.iterdir() if file.suffix in WEIGHT_SUFFIXES)
