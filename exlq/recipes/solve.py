"""Targets to answers: each target in each format that can meet it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from exlq.errors import ConfigError, InputError
from exlq.measurement import Measurement
from exlq.recipes.frontier import Point, frontier
from exlq.recipes.room import Wishes, formats_of, room_of
from exlq.recipes.sheet import Sheet, sheet_of
from exlq.recipes.targets import Answer, within_bits, within_bytes, within_kl
from exlq.recipes.two_budgets import Budgets, within_budgets


@dataclass(frozen=True)
class Targets:
    """What is asked for; each value is a target of its own."""

    bits: tuple[float, ...] = ()
    file_sizes: tuple[int, ...] = ()
    max_kls: tuple[float, ...] = ()
    budgets: Budgets | None = None

    @property
    def count(self) -> int:
        return len(self.bits) + len(self.file_sizes) + len(self.max_kls) + (self.budgets is not None)


@dataclass(frozen=True)
class Solved:
    """The answers, target by target, and a line for each format that could not meet one."""

    answers: tuple[Answer, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Desk:
    """The sheets of the formats asked for."""

    sheets: tuple[Sheet, ...]
    wishes: Wishes
    required: bool  # whether a format that cannot meet a target is an error
    notes: list[str] = field(default_factory=list)

    def met(self, solve: Callable[[Sheet], Answer]) -> list[Answer]:
        answers: list[Answer] = []
        failed: dict[str, InputError] = {}
        for sheet in self.sheets:
            try:
                answers.append(solve(sheet))
            except InputError as exc:
                if self.required:
                    raise
                failed[sheet.format] = exc
        if failed and not answers:
            raise next(iter(failed.values()))
        self.notes.extend(f"no {name}: {exc}" for name, exc in failed.items())
        return answers


def solve(
    measurement: Measurement,
    targets: Targets,
    formats: Sequence[str] | None = None,
    wishes: Wishes | None = None,
) -> Solved:
    """The best options for every target in every format, proven optimal.

    Args:
        formats: those that must meet every target; None: all that were measured and can.

    Raises:
        InputError: for a target that no format meets, or one that a format asked for does not.
    """
    desk = _desk(measurement, formats, wishes or Wishes())
    answers: list[Answer] = []
    for bits in targets.bits:
        answers += desk.met(lambda sheet, b=bits: within_bits(room_of(sheet, desk.wishes, b), b))  # type: ignore[misc]
    for size in targets.file_sizes:
        answers += desk.met(lambda sheet, s=size: within_bytes(room_of(sheet, desk.wishes), s))  # type: ignore[misc]
    for kl in targets.max_kls:
        answers += desk.met(lambda sheet, k=kl: within_kl(room_of(sheet, desk.wishes), k))  # type: ignore[misc]
    if targets.budgets is not None:
        answers += _split(desk, targets.budgets)
    return Solved(tuple(answers), tuple(desk.notes))


def frontiers(
    measurement: Measurement, formats: Sequence[str] | None = None, wishes: Wishes | None = None
) -> dict[str, list[Point]]:
    """The size-KL frontier of every format; GGUF's embedding and head are chosen like all others."""
    desk = _desk(measurement, formats, wishes or Wishes())
    return {sheet.format: frontier(room_of(sheet, desk.wishes)) for sheet in desk.sheets}


def _desk(measurement: Measurement, formats: Sequence[str] | None, wishes: Wishes) -> _Desk:
    names = formats_of(measurement, formats)
    return _Desk(tuple(sheet_of(measurement, name) for name in names), wishes, formats is not None)


def _split(desk: _Desk, budgets: Budgets) -> list[Answer]:
    """llama.cpp alone runs part of a model on the CPU."""
    sheets = [sheet for sheet in desk.sheets if sheet.format == "gguf"]
    if not sheets:
        raise ConfigError(
            "--gpu-bytes and --cpu-bytes are for GGUF, which is not among the formats; drop them"
        )
    return [within_budgets(room_of(sheets[0], desk.wishes), budgets)]
