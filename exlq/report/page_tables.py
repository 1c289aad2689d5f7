"""The plain tables of a report: calibration, settings, hashes, machine, times."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from exlq.report.eta import duration
from exlq.report.page_source import Source
from exlq.sizes import format_bytes

LABELS = {
    "file": "file",
    "column": "column",
    "kind": "kind of column",
    "rows": "rows used",
    "row_length": "tokens in a row",
    "tokens": "tokens in the text",
    "documents": "texts",
    "mode": "rows taken from",
    "parse_special": "special tokens parsed",
    "bos_id": "token put in front",
    "seed": "seed",
    "notes": "notes",
}
TEXT_LABELS = {
    "rows": "rows of the file",
    "empty": "empty rows",
    "characters": "characters",
    "words": "words",
    "lengths": "characters of a text",
    "duplicates": "texts that repeat others",
    "languages": "languages, roughly",
    "code": "code, roughly",
    "scripts": "scripts",
    "special": "special tokens spelled out",
    "odd": "odd texts",
}
SHARES = ("languages", "scripts")
MOST_SHARES = 8
HASHES = ("sha256", "tokenizer_sha256", "fingerprint")
Row = tuple[str, ...]


def calibration_rows(source: Source) -> list[Row]:
    """What models were quantized on and what options were measured on, key by key, whatever is recorded."""
    used = {"quantized on": source.summary.get("calibration")}
    used["measured on"] = source.record.calibration if source.record else None
    columns = {name: found for name, found in used.items() if found}
    keys = dict.fromkeys(key for found in columns.values() for key in found)
    known = sorted((key for key in keys if key not in HASHES), key=_order)
    rows = [
        (LABELS.get(key, key), *(_text(found.get(key, "—")) for found in columns.values())) for key in known
    ]
    return [("", *columns), *rows]


def text_rows(source: Source) -> list[Row]:
    """What `exlq doctor` finds in the calibration text, and its advice; empty where that is not known."""
    found = source.summary.get("calibration_text")
    if not isinstance(found, Mapping):
        return []
    rows = [(label, _text_value(key, found[key])) for key, label in TEXT_LABELS.items() if key in found]
    told = found.get("advice") or ()
    return [("", "the text"), *rows, *(("advice", _text(each.get("text"))) for each in told)]


def _text_value(key: str, value: Any) -> str:
    """A value of the diagnosis; shares of one in percent."""
    if key == "code":
        return f"{100 * value:.1f} %"
    if key in SHARES:
        largest = sorted(value.items(), key=lambda item: -item[1])[:MOST_SHARES]
        return ", ".join(f"{name} {100 * share:.1f} %" for name, share in largest) or "none"
    if key == "duplicates":
        return f"{value['exact']:,} to the letter, {value['near']:,} nearly"
    return _text(value)


def detail_sections(source: Source) -> Iterator[tuple[str, list[Row]]]:
    """Titled tables of what the figures depend on; only of what there is."""
    summary, record = source.summary, source.record
    run: list[Row] = [("command", str(summary["command"]))] if "command" in summary else []
    run += [(f"{stage}, time", duration(seconds)) for stage, seconds in summary.get("seconds", {}).items()]
    if "peak_anonymous_bytes" in summary:
        run.append(("peak memory", format_bytes(summary["peak_anonymous_bytes"])))
    run += [(f"{name}, written to", path) for name, made in source.results.items() for path in made.paths]
    sections: dict[str, list[Row]] = {
        "Command and times": run,
        "Settings": list(_leaves(summary.get("settings") or (record.settings if record else {}))),
        "Machine": list(_leaves(summary.get("machine") or (record.extra.get("made_with") if record else {}))),
        "Hashes": list(_hashes(source)),
    }
    if source.profile:
        yield "Where the time went", list(source.profile)
    yield from ((title, [("", "value"), *rows]) for title, rows in sections.items() if rows)


def _hashes(source: Source) -> Iterator[Row]:
    if "fingerprint" in source.summary:
        yield "fingerprint of the job", str(source.summary["fingerprint"])
    parts = {"quantized on": source.summary.get("calibration")}
    if source.record:
        parts |= {"model": source.record.model, "measured on": source.record.calibration}
    for part, found in parts.items():
        kept = {key: value for key, value in (found or {}).items() if key in HASHES}
        yield from ((f"{part}, {name}", value) for name, value in _leaves(kept))


def _leaves(value: Any, path: str = "") -> Iterator[Row]:
    """Scalars and lists of a nested mapping, under the names that lead to them."""
    if isinstance(value, Mapping):
        for key, below in value.items():
            yield from _leaves(below, f"{path} {key}".strip())
    else:
        yield path, _text(value)


def _order(key: str) -> int:
    known = list(LABELS)
    return known.index(key) if key in LABELS else len(known)


def _text(value: Any) -> str:
    """A JSON value as a person writes it."""
    if value is None:
        return "—"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(below)}" for key, below in value.items()) or "—"
    if isinstance(value, (list, tuple)):
        return "; ".join(map(_text, value)) or "none"
    return str(value)
