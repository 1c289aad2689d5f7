"""What a report is made of: the summary and the measurement of a job, read and checked."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exlq.errors import InputError
from exlq.files import read_json
from exlq.measurement import Measurement, load
from exlq.report.profile import caption, profile_rows
from exlq.sizes import format_bytes

SUMMARY, MEASUREMENT, PAGE = "summary.json", "measurement.json", "report.html"
WANTED = "give the directory that exlq convert -o made, or a measurement.json"
EVALUATED = ("perplexity_base", "perplexity", "kl_mean", "kl_se", "top1_agreement", "n_tokens")


@dataclass(frozen=True)
class Result:
    """One format of a finished job; KL divergences in nats per token, None where none was predicted."""

    bpw: float
    n_bytes: int
    predicted_kl: float | None
    predicted_se: float | None
    evaluation: Mapping[str, float]
    allocation: Mapping[str, str]
    optimality_gap: float | None
    file_bpw: float | None
    paths: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """A finished job, or a measurement alone: then `summary` and `results` are empty.

    `record` is None for a job that measured nothing; `page` is where the report goes unless told.
    """

    name: str
    target: str
    page: Path
    record: Measurement | None
    summary: Mapping[str, Any] = field(default_factory=dict)
    results: Mapping[str, Result] = field(default_factory=dict)
    profile: tuple[tuple[str, ...], ...] = ()  # rows of its table, where one was asked for

    @property
    def corrects(self) -> bool:
        """Whether later linears make up for what earlier ones have changed, as conversions do by default."""
        settings = self.summary.get("settings", {})
        methods = settings.get("methods", {})
        return bool(settings.get("gptq", True) and methods.get("input_correction", True))


def read_source(path: Path) -> Source:
    """The job in a directory, or the measurement in a file.

    Raises:
        InputError: if there is neither, or what is there is broken.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist; {WANTED}")
    if path.is_file():
        return Source(path.stem, "measurement", path.with_suffix(".html"), load(path))
    if not (path / SUMMARY).is_file():
        raise InputError(f"{path} has no {SUMMARY}, so it is no finished job; {WANTED}")
    record = load(path / MEASUREMENT) if (path / MEASUREMENT).is_file() else None
    try:
        summary = read_json(path / SUMMARY)
        return Source(
            name=re.split(r"[\\/]", summary["settings"]["in_dir"].rstrip("\\/"))[-1] or "model",
            target=_target(summary["target"]),
            page=path / PAGE,
            record=record,
            summary=summary,
            results={name: _result(made) for name, made in summary["outputs"].items()},
            profile=_profile(summary.get("profile")),
        )
    except KeyError as exc:
        raise InputError(f"{path / SUMMARY} lacks {exc}; make it again with exlq convert -nr") from exc
    except (ValueError, TypeError, AttributeError) as exc:
        raise InputError(f"{path / SUMMARY} is broken ({exc}); make it again with exlq convert -nr") from exc


def _result(made: Mapping[str, Any]) -> Result:
    evaluation = {**made["evaluation"], **{name: float(made["evaluation"][name]) for name in EVALUATED}}
    return Result(
        bpw=float(made["bpw"]),
        n_bytes=int(made["bytes"]),
        predicted_kl=_maybe(made.get("predicted_kl")),
        predicted_se=_maybe(made.get("predicted_se")),
        evaluation=evaluation,
        allocation={str(key): str(desc) for key, desc in made["allocation"].items()},
        optimality_gap=_maybe(made.get("optimality_gap")),
        file_bpw=_maybe(made.get("file_bpw")),
        paths=tuple(map(str, made["paths"])),
        notes=tuple(map(str, made["notes"])),
    )


def _profile(found: Mapping[str, Any] | None) -> tuple[tuple[str, ...], ...]:
    return () if found is None else (*profile_rows(found), ("", caption(found)))


def _maybe(value: Any) -> float | None:
    return None if value is None else float(value)


def _target(targets: Mapping[str, Any]) -> str:
    words: dict[str, Callable[[Any], str]] = {
        "-b": lambda value: f"{value:g} bits per weight",
        "--file-size": lambda value: f"at most {format_bytes(value)}",
        "--gguf-type": str,
    }
    return ", ".join(words.get(flag, str)(value) for flag, value in targets.items())
