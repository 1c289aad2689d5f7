"""The record's JSON: readable by eye, one option a line, everything checked when it is read.

{"format": "exlq-measurement", "version": 1, "model": {…}, "calibration": {…}, "settings": {…},
 "measurement": [{"key": …, "numel": …, "options": [
  {"desc": …, "bpw": …, "total_bits": …, "err": …, "qparams": {…}, "err_heldout": …, "loss": …}, …]}, …]}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

from exlq.errors import MeasurementError
from exlq.files import atomic_write_text, read_json
from exlq.measurement.record import RESERVED, SECTIONS, LinearRecord, Measurement, OptionRecord, shown

FORMAT, VERSION = "exlq-measurement", 1

Record = TypeVar("Record", LinearRecord, OptionRecord)


def save(measurement: Measurement, path: Path) -> None:
    """Write the record's JSON; a file already there is replaced at once or not at all."""
    atomic_write_text(path, dumps(measurement))


def dumps(measurement: Measurement) -> str:
    """The record as JSON text, one option a line, keys in a fixed order.

    Raises MeasurementError where a section holds what JSON cannot.
    """
    head = {"format": FORMAT, "version": VERSION, **measurement.origin}
    linears = ",\n".join(_linear_text(linear) for linear in measurement.linears)
    parts = [_entry(name, value) for name, value in head.items()]
    parts.append(f'"measurement": [\n{linears}\n]')
    parts.extend(_entry(name, value) for name, value in measurement.extra.items())
    return "{\n" + ",\n".join(parts) + "\n}\n"


def as_stored(value: Any) -> Any:
    """The value as it comes back from a file: tuples are lists, mappings are dicts."""
    return json.loads(_text(value))


def load(path: Path) -> Measurement:
    """The record in a file, checked whole.

    Raises MeasurementError in one line that names the file, the linear and what is wrong.
    """
    try:
        return _record(read_json(path))
    except MeasurementError as exc:
        raise MeasurementError(f"{path}: {exc}") from exc
    except OSError as exc:
        raise MeasurementError(f"{path} cannot be read: {exc.strerror}") from exc
    except ValueError as exc:
        raise MeasurementError(f"{path} is not valid JSON: {' '.join(str(exc).split())}") from exc


def _record(tree: object) -> Measurement:
    tree = _object("the file", tree)
    if tree.get("format") != FORMAT:
        raise MeasurementError(f"format is {shown(tree.get('format'))}, not {FORMAT!r}; measure with exlq")
    if type(tree.get("version")) is not int or tree["version"] != VERSION:
        raise MeasurementError(f"version is {shown(tree.get('version'))}, not {VERSION}; measure again")
    sections = {name: _object(name, tree.get(name)) for name in SECTIONS}
    linears = enumerate(_list("measurement", tree.get("measurement")))
    extra = {name: value for name, value in tree.items() if name not in RESERVED}
    return Measurement(**sections, linears=tuple(_linear(i, value) for i, value in linears), extra=extra)


def _linear(index: int, value: object) -> LinearRecord:
    entry = _object(f"linear {index}", value)
    name = shown(entry["key"]).strip("'") if isinstance(entry.get("key"), str) else f"linear {index}"
    options = enumerate(_list(f"{name}: options", entry.get("options")))
    try:
        made = tuple(_option(i, option) for i, option in options)
    except MeasurementError as exc:
        raise MeasurementError(f"{name}, {exc}") from exc
    return _made(LinearRecord, name, {**entry, "options": made})


def _option(index: int, value: object) -> OptionRecord:
    entry = _object(f"option {index}", value)
    bits = entry.get("total_bits")
    if isinstance(bits, float) and bits.is_integer():
        entry = {**entry, "total_bits": int(bits)}
    return _made(OptionRecord, f"option {index}", entry)


def _made(kind: type[Record], name: str, entry: Mapping[str, Any]) -> Record:
    """The record with these fields, missing and unknown ones refused."""
    needed = {f.name for f in fields(kind) if f.default is MISSING}
    if missing := sorted(needed - set(entry)):
        raise MeasurementError(f"{name} lacks {', '.join(missing)}; measure again")
    if unknown := sorted(set(entry) - {f.name for f in fields(kind)}):
        raise MeasurementError(f"{name} has the unknown {', '.join(map(shown, unknown))}; remove it")
    return kind(**entry)


def _entry(name: str, value: object) -> str:
    return f"{_text(name)}: {_text(value)}"


def _linear_text(linear: LinearRecord) -> str:
    head = {"key": linear.key, "numel": linear.numel, "sensitivity": linear.sensitivity}
    head |= {"tie": linear.tie, "sampled_rows": linear.sampled_rows}
    options = ",\n".join(f"  {_option_text(option)}" for option in linear.options)
    entries = ", ".join(_entry(name, value) for name, value in head.items() if value is not None)
    return f' {{{entries}, "options": [\n{options}\n ]}}'


def _option_text(option: OptionRecord) -> str:
    """As ExLlamaV2's records have it, bits as a float of exact value."""
    entry = {f.name: getattr(option, f.name) for f in fields(option)}
    entry["total_bits"] = float(option.total_bits)
    return _text({name: value for name, value in entry.items() if value is not None})


def _text(value: object) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_plain)
    except (TypeError, ValueError) as exc:
        raise MeasurementError(f"{shown(value)} cannot be stored as JSON: {exc}") from exc


def _plain(value: object) -> dict[Any, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{type(value).__name__} has no JSON form")
    return dict(value)


def _object(name: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise MeasurementError(f"{name} is {shown(value)}, not a JSON object")
    return value


def _list(name: str, value: object) -> list[Any]:
    if not isinstance(value, list):
        raise MeasurementError(f"{name} is {shown(value)}, not a JSON list")
    return value
