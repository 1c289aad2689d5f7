"""What a measurement.json holds, and what it knows of a model made with it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exlq.errors import InputError
from exlq.files import read_json
from exlq.inspect.record import Entry, Inspection, Ways
from exlq.measurement import LinearRecord, Measurement, OptionRecord, load
from exlq.names import FORMATS

SHOWN_BITS = (3, 4, 5)  # at which errors are shown
NEAR_BITS = 0.5  # an option so far off is not "about"
SHOWN_EXPERTS = 5  # of fewest tokens
SORTED_AT = 4  # bits whose error stands for the linear


def inspect_measurement(path: Path) -> Inspection:
    """The options of every linear by format; raises MeasurementError as `measurement.load` does."""
    record = load(path)
    model, calibration = record.model, record.calibration
    rows, length = calibration.get("rows"), calibration.get("row_length")
    facts = {
        "architecture": model.get("architecture", "unknown"),
        "calibration": f"{rows} rows of {length} tokens of {calibration.get('file')}",
        "linears": len(record.linears),
        "options": sum(len(linear.options) for linear in record.linears),
        "weights": sum(linear.numel for linear in record.linears),
        **{name: _plain(record.extra[name]) for name in ("made_with",) if name in record.extra},
        **_coverage(record),
        **_evaluations(record),
    }
    entries = tuple(
        entry for linear in record.linears for name in FORMATS for entry in _entries(linear, name)
    )
    return Inspection(str(path), "measurement", facts, entries, metadata=record.origin)


def _entries(linear: LinearRecord, name: str) -> list[Entry]:
    """One entry where the format has options for the linear."""
    options = [option for option in linear.options if option.format == name]
    if not options:
        return []
    bits = [option.bpw for option in options]
    near = {n: min(options, key=lambda option: abs(option.bpw - n)) for n in SHOWN_BITS}
    errors = {n: option.err for n, option in near.items() if abs(option.bpw - n) <= NEAR_BITS}
    at = min(options, key=lambda option: abs(option.bpw - SORTED_AT))
    return [
        Entry(
            linear.key,
            name,
            (),
            linear.numel,
            error=at.err,
            loss=at.loss,
            sensitivity=linear.sensitivity,
            ways=Ways(len(options), min(bits), max(bits), errors),
        )
    ]


def _coverage(record: Measurement) -> dict[str, str]:
    """How many of the calibration's tokens go to each expert: the mean, and those of the fewest."""
    told = record.extra.get("experts")
    if not isinstance(told, dict) or not told:
        return {}
    counts = sorted((n, block, expert) for block, own in told.items() for expert, n in enumerate(own))
    fewest = "; ".join(f"{block}, {expert} ({n:,})" for n, block, expert in counts[:SHOWN_EXPERTS])
    mean = sum(n for n, _, _ in counts) / len(counts)
    return {"experts": f"{len(counts)}, {mean:,.0f} tokens each on average, fewest: {fewest}"}


def _evaluations(record: Measurement) -> dict[str, Any]:
    """How many conversions have told what their predictions came to."""
    told = record.extra.get("evaluations")
    return {"evaluations": len(told)} if isinstance(told, dict | list) else {}


def _plain(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {of}" for name, of in value.items())
    return str(value)


def chosen(job: Path, name: str) -> tuple[Mapping[str, tuple[LinearRecord, OptionRecord]], tuple[str, ...]]:
    """The option of each linear that a job's summary names for a format, with the record of it; notes.

    Args:
        job: the directory that holds summary.json and measurement.json; nothing is found where they are not.
    """
    summary, measurement = job / "summary.json", job / "measurement.json"
    if not summary.is_file() or not measurement.is_file():
        return {}, ()
    try:
        allocation = read_json(summary)["outputs"][name]["allocation"]
        records = {linear.key: linear for linear in load(measurement).linears}
        found = {
            key: (records[key], option)
            for key, desc in allocation.items()
            if key in records
            for option in records[key].options
            if option.desc == desc and option.format == name
        }
    except (InputError, OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        return {}, (
            f"{job} has a summary or measurement that cannot be read ({exc}), so errors are not shown",
        )
    return found, ()
