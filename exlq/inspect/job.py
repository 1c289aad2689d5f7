"""What a directory of `exlq convert -o` holds, finished or not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from exlq.errors import InputError
from exlq.files import read_json
from exlq.inspect.record import Inspection
from exlq.measurement import load
from exlq.names import FORMATS

SUMMARY, MEASUREMENT, PARTIAL, MARK = (
    "summary.json",
    "measurement.json",
    "measurement.partial.json",
    "job.json",
)


def is_job(directory: Path) -> bool:
    return (directory / SUMMARY).is_file() or (directory / "work" / MARK).is_file()


def inspect_job(directory: Path) -> Inspection:
    """What was made, with its figures; of an unfinished job how far it is.

    Raises:
        InputError: for a summary or a measurement that is broken.
    """
    if not (directory / SUMMARY).is_file():
        facts = {"stage": _stage(directory)}
        return Inspection(str(directory), "job", facts, notes=("the same convert command goes on with it",))
    try:
        summary = read_json(directory / SUMMARY)
        facts = dict(_facts(summary))
        notes = list(map(str, summary["notes"]))
        notes += [f"see exlq inspect {_model_path(made)}" for made in summary["outputs"].values()]
        settings = dict(summary["settings"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as exc:
        raise InputError(
            f"{directory / SUMMARY} is broken ({' '.join(repr(exc).split())}); make it again with convert -nr"
        ) from exc
    return Inspection(str(directory), "job", facts, notes=tuple(notes), metadata=settings)


def _facts(summary: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    calibration = summary["calibration"]
    yield "command", summary["command"]
    yield "target", ", ".join(f"{flag} {value}" for flag, value in summary["target"].items())
    for name, made in summary["outputs"].items():
        found = made["evaluation"]
        yield f"{name}: bits per weight", round(made["bpw"], 4)
        yield f"{name}: bytes", made["bytes"]
        yield f"{name}: KL divergence", round(found["kl_mean"], 6)
        if made["predicted_kl"] is not None:
            yield f"{name}: predicted", round(made["predicted_kl"], 6)
        yield f"{name}: perplexity", round(found["perplexity"], 4)
        yield f"{name}: same best token", round(found["top1_agreement"], 4)
    first = list(summary["outputs"].values())[0]["evaluation"]  # noqa: RUF015  (of none a LookupError)
    yield "base: perplexity", round(first["perplexity_base"], 4)
    rows = f"{calibration['rows']} rows of {calibration['row_length']} tokens of {calibration['file']}"
    yield "calibration", rows
    yield "seconds", {stage: round(float(seconds), 1) for stage, seconds in summary["seconds"].items()}


def _model_path(made: Mapping[str, Any]) -> str:
    """The directory, or the first GGUF file."""
    return str(made["paths"][0])


def _stage(directory: Path) -> str:
    """The stage that an unfinished job is at, by what it has left."""
    work = directory / "work"
    if (directory / MEASUREMENT).is_file():
        begun = [name for name in FORMATS if (work / name).exists()]
        measured = len(load(directory / MEASUREMENT).linears)
        return f"measured ({measured} linears); " + (
            f"writing {' and '.join(begun)}" if begun else "no format is begun"
        )
    if (work / PARTIAL).is_file():
        return f"measuring, {len(load(work / PARTIAL).linears)} linears done"
    return "begun, no linear is measured yet"
