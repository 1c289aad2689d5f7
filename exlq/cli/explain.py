"""`exlq explain`: why every matrix has the option it has."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType

from exlq.cli.screen import Screen
from exlq.cli.solve import formats_of, load_record, wishes_of
from exlq.errors import ConfigError
from exlq.measurement import Measurement
from exlq.recipes import stored
from exlq.recipes.as_json import answer_json, changes_json, reasons_json
from exlq.recipes.explain import bought, changes, default_spend, reasons, reopened
from exlq.recipes.room import Room, Wishes, room_of
from exlq.recipes.sheet import sheet_of
from exlq.recipes.solve import Targets, solve
from exlq.recipes.targets import Answer
from exlq.report.recipes import changes_table, kl_words, reasons_table
from exlq.sizes import format_bytes, parse_bytes

LIMIT = 30  # tensors in a table


@dataclass(frozen=True)
class _Case:
    """One format's allocation, and what was left to choose."""

    room: Room
    answer: Answer


def run(parsed: argparse.Namespace, screen: Screen) -> None:
    record = load_record(parsed.measurement)
    wishes, pattern = wishes_of(parsed, record), _pattern(parsed.filter)
    cases, notes = _cases(parsed, record, wishes)
    shown: list[RenderableType] = []
    result: dict[str, Any] = {"notes": notes, "formats": {}}
    other = None if parsed.against is None else stored.load(parsed.against)
    for name, case in cases.items():
        tables, found = _explained(case, parsed, pattern)
        if other is not None and name in other.outputs:
            opposite = reopened(sheet_of(record, name), other.outputs[name], wishes)[1]
            table, differing = _compared(case.answer, opposite, parsed)
            tables, found = [table], {"against": differing}
        elif other is not None:
            notes.append(f"{parsed.against} has no {name}")
            continue
        shown += tables
        result["formats"][name] = {**answer_json(case.answer), **found}
    if not result["formats"]:
        raise ConfigError(
            f"{parsed.against} has none of the formats {', '.join(cases)}; give another --format"
        )
    if parsed.json:
        print(json.dumps(result, indent=1))
    else:
        screen.show(Group(*shown, *notes), result)


def _cases(
    parsed: argparse.Namespace, record: Measurement, wishes: Wishes
) -> tuple[dict[str, _Case], list[str]]:
    """What is to be explained, by format, and notes."""
    sizes = () if parsed.file_size is None else (parse_bytes(parsed.file_size),)
    targets = Targets(_given(parsed.bits), sizes, _given(parsed.max_kl))
    if targets.count + (parsed.recipe is not None) != 1:
        raise ConfigError("give one of --recipe FILE, -b BITS, --file-size SIZE and --max-kl KL to explain")
    formats = formats_of(parsed.format)
    if parsed.recipe is not None:
        return _from_recipe(parsed, record, wishes, formats)
    solved = solve(record, targets, formats, wishes)
    rooms = {a.sheet.format: sheet_of(record, a.sheet.format) for a in solved.answers}
    cases = {
        answer.sheet.format: _Case(room_of(rooms[answer.sheet.format], wishes, parsed.bits), answer)
        for answer in solved.answers
    }
    return cases, list(solved.notes)


def _from_recipe(
    parsed: argparse.Namespace, record: Measurement, wishes: Wishes, formats: tuple[str, ...] | None
) -> tuple[dict[str, _Case], list[str]]:
    if wishes.pins:
        raise ConfigError("--pin chooses and --recipe is chosen already: give one of them")
    recipe = stored.load(parsed.recipe)
    names = [name for name in recipe.outputs if formats is None or name in formats]
    if not names:
        raise ConfigError(f"{parsed.recipe} has {', '.join(recipe.outputs)}, not {parsed.format}")
    cases = {name: _Case(*reopened(sheet_of(record, name), recipe.outputs[name], wishes)) for name in names}
    same = recipe.measurement == stored.origin_sha256(record)
    return cases, [] if same else [f"{parsed.recipe} was solved from another measurement"]


def _explained(
    case: _Case, parsed: argparse.Namespace, pattern: re.Pattern[str]
) -> tuple[list[RenderableType], dict[str, Any]]:
    """Reasons and what more bytes would buy, as tables and as JSON."""
    answer, room = case.answer, case.room
    found = [r for r in reasons(room, answer.options) if any(pattern.search(key) for key in r.keys)]
    spend, why = default_spend(answer)
    if parsed.spend is not None:
        spend, why = parse_bytes(parsed.spend), "--spend"
    after = bought(room, answer.options, spend)
    bought_changes = changes(answer.options, after.options)
    title = (
        f"{format_bytes(spend)} more ({why}) would buy a predicted KL of {kl_words(after.predicted)}, "
        f"now {kl_words(answer.predicted)}"
    )
    limit = _limit(parsed)
    tables: list[RenderableType] = [
        reasons_table(answer, found, found[:limit] if limit else found),
        changes_table(title, answer.options, after.options, bought_changes, limit),
    ]
    kept = found[: parsed.limit] if parsed.limit else found
    more = {"spend_bytes": spend, "why": why, **answer_json(after), "changes": changes_json(bought_changes)}
    return tables, {"tensors": reasons_json(kept), "spend": more}


def _compared(
    answer: Answer, other: Answer, parsed: argparse.Namespace
) -> tuple[RenderableType, dict[str, Any]]:
    """How another recipe of the same format differs."""
    differing = changes(answer.options, other.options)
    title = (
        f"{answer.sheet.format}: {format_bytes(answer.n_bytes)}, predicted KL {kl_words(answer.predicted)}, "
        f"against {format_bytes(other.n_bytes)}, {kl_words(other.predicted)}"
    )
    table = changes_table(title, answer.options, other.options, differing, _limit(parsed))
    return table, {**answer_json(other), "changes": changes_json(differing)}


def _limit(parsed: argparse.Namespace) -> int:
    return LIMIT if parsed.limit is None else int(parsed.limit)


def _given(value: float | None) -> tuple[float, ...]:
    return () if value is None else (value,)


def _pattern(text: str | None) -> re.Pattern[str]:
    try:
        return re.compile(text or "")
    except (re.error, OverflowError, RecursionError) as exc:
        raise ConfigError(f"--filter {text!r} is no regular expression: {exc}; correct it") from exc
