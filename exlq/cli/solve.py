"""`exlq solve`: the best options for a size or a divergence, from a measurement alone."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType

from exlq import measurement
from exlq.cli.screen import Screen
from exlq.errors import ConfigError
from exlq.measurement import Measurement
from exlq.recipes import stored
from exlq.recipes.as_json import answer_json, points_json
from exlq.recipes.room import Wishes, parse_pins, parse_types
from exlq.recipes.solve import Solved, Targets, frontiers, solve
from exlq.recipes.two_budgets import Budgets
from exlq.report.recipes import answers_table, frontier_table, split_words
from exlq.sizes import parse_bytes

MEASUREMENT = "measurement.json"


def run(parsed: argparse.Namespace, screen: Screen) -> None:
    targets = _targets(parsed)
    if not targets.count and not parsed.frontier:
        raise ConfigError(
            "no target: give -b BITS, --file-size SIZE, --max-kl KL, --gpu-bytes with --cpu-bytes "
            "or --frontier"
        )
    if parsed.output is not None and targets.count != 1:
        raise ConfigError(f"-o writes one recipe, {targets.count} targets are given; give one target")
    record = load_record(parsed.measurement)
    formats, wishes = formats_of(parsed.format), wishes_of(parsed, record)
    solved = solve(record, targets, formats, wishes) if targets.count else Solved(())
    lines = frontiers(record, formats, wishes) if parsed.frontier else {}
    if parsed.output is not None:
        stored.save(stored.recipe_of(solved.answers, record), parsed.output)
    result: dict[str, Any] = {"answers": [answer_json(answer) for answer in solved.answers]}
    result["notes"] = list(solved.notes)
    if lines:
        result["frontier"] = {name: points_json(points) for name, points in lines.items()}
    if parsed.json:
        print(json.dumps(result, indent=1))
        return
    shown: list[RenderableType] = [answers_table(solved.answers)] if solved.answers else []
    shown += [split_words(answer) for answer in solved.answers if answer.split is not None]
    shown += [frontier_table(name, points, parsed.limit) for name, points in lines.items()]
    shown += solved.notes
    if parsed.output is not None:
        shown.append(f"recipe: {parsed.output}")
    screen.show(Group(*shown), result)


def load_record(path: Path) -> Measurement:
    """The measurement in a file, or in the directory that holds it."""
    return measurement.load(path / MEASUREMENT if path.is_dir() else path)


def formats_of(listed: str | None) -> tuple[str, ...] | None:
    return None if listed is None else tuple(name for name in listed.split(",") if name)


def wishes_of(parsed: argparse.Namespace, record: Measurement) -> Wishes:
    """What the flags of `arrange_choice` leave to the solver."""
    return Wishes(parse_types(parsed.types, record), parse_pins(parsed.pin, record), parsed.head_bits)


def _targets(parsed: argparse.Namespace) -> Targets:
    return Targets(
        tuple(parsed.bits), tuple(map(parse_bytes, parsed.file_size)), tuple(parsed.max_kl), _budgets(parsed)
    )


def _budgets(parsed: argparse.Namespace) -> Budgets | None:
    if parsed.gpu_bytes is None and parsed.cpu_bytes is None:
        if parsed.n_gpu_layers is not None:
            raise ConfigError("--n-gpu-layers goes with --gpu-bytes and --cpu-bytes; give both")
        return None
    if parsed.gpu_bytes is None or parsed.cpu_bytes is None:
        raise ConfigError("--gpu-bytes and --cpu-bytes go together; give both")
    return Budgets(parse_bytes(parsed.gpu_bytes), parse_bytes(parsed.cpu_bytes), parsed.n_gpu_layers)
