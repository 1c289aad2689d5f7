"""What a command shows: results on stdout, progress and failures on stderr, or JSON lines for programs."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from typing import Any, Protocol

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn

from exlq.report.eta import Eta, Reading, duration

LINE_EVERY_S = 5.0  # of progress that is no bar


class Screen(Protocol):
    """Where a command says what it has to say; itself the pipeline's `Progress`."""

    def __enter__(self) -> Screen: ...
    def __exit__(self, *_: object) -> None: ...
    def __call__(self, stage: str, done: int, total: int) -> None: ...

    def expect(self, stages: Mapping[str, float]) -> None:
        """The seconds each stage to come is expected to take, in order."""
        ...

    def tell(self, shown: RenderableType) -> None:
        """What is good to know before the result."""
        ...

    def show(self, shown: RenderableType, result: Mapping[str, Any]) -> None:
        """The result, for a person and for a program."""
        ...

    def fail(self, message: str, code: int) -> None:
        """Why there is none, in one line."""
        ...


def make_screen(parsed: argparse.Namespace) -> Screen:
    """The screen that the flags ask for."""
    return JsonScreen() if parsed.status_json else Terminal(quiet=parsed.quiet, verbose=parsed.verbose)


class Terminal:
    """For a person: bars where stderr is a terminal, else lines."""

    def __init__(self, *, quiet: bool = False, verbose: bool = False) -> None:
        self._quiet, self._verbose = quiet, verbose
        self._out = Console(soft_wrap=True)
        self._err = Console(stderr=True, soft_wrap=True)
        self._eta = Eta({}, time.monotonic)
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._last = ("", -LINE_EVERY_S)

    def __enter__(self) -> Screen:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def expect(self, stages: Mapping[str, float]) -> None:
        self._eta = Eta(stages, time.monotonic)

    def __call__(self, stage: str, done: int, total: int) -> None:
        reading = self._eta.step(stage, done, total)
        if self._quiet:
            return
        if self._err.is_terminal and not self._verbose:
            self._draw(stage, done, total, reading)
        else:
            self._line(stage, done, total, reading)

    def tell(self, shown: RenderableType) -> None:
        if not self._quiet:
            self._print(self._out, shown)

    def show(self, shown: RenderableType, result: Mapping[str, Any]) -> None:
        if self._bars is not None:
            self._bars.stop()
        self._print(self._out, shown)

    def fail(self, message: str, code: int) -> None:
        if self._bars is not None:
            self._bars.stop()
        self._err.print(f"error: {' '.join(message.split())}", markup=False, highlight=False)

    def _print(self, console: Console, shown: RenderableType) -> None:
        console.print(shown, markup=False, highlight=False)

    def _line(self, stage: str, done: int, total: int, reading: Reading) -> None:
        """One line when a stage begins and ends, and now and then; of every step with -v."""
        now = time.monotonic()
        begins = self._last[0] != stage
        if begins or done == total or self._verbose or now - self._last[1] >= LINE_EVERY_S:
            self._last = (stage, now)
            left = "" if reading.left_s is None or done == total else f", {duration(reading.left_s)} left"
            self._print(self._err, f"{stage} {done}/{total}{left}")

    def _draw(self, stage: str, done: int, total: int, reading: Reading) -> None:
        if self._bars is None:
            words, told = TextColumn("{task.description}"), TextColumn("{task.fields[told]}")
            self._bars = Progress(SpinnerColumn(), words, BarColumn(), told, console=self._err)
            self._bars.start()
            self._tasks["all"] = self._bars.add_task("in all", total=1.0, told="")
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total, told="")
        told_now = _left(f"{done}/{total}", reading.stage_left_s)
        self._bars.update(self._tasks[stage], completed=done, told=told_now)
        self._bars.update(self._tasks["all"], completed=reading.share, told=_left("", reading.left_s))


class JsonScreen:
    """For a program: one JSON object a line on stdout, its kind under `event`."""

    def __init__(self) -> None:
        self._eta = Eta({}, time.monotonic)

    def __enter__(self) -> Screen:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def expect(self, stages: Mapping[str, float]) -> None:
        self._eta = Eta(stages, time.monotonic)
        self._say("plan", {"expected_s": dict(stages)})

    def __call__(self, stage: str, done: int, total: int) -> None:
        self._say(
            "progress",
            {"stage": stage, "done": done, "total": total, **self._eta.step(stage, done, total)._asdict()},
        )

    def tell(self, shown: RenderableType) -> None:
        if isinstance(shown, str):
            self._say("note", {"text": shown})

    def show(self, shown: RenderableType, result: Mapping[str, Any]) -> None:
        self._say("result", result)

    def fail(self, message: str, code: int) -> None:
        self._say("error", {"message": " ".join(message.split()), "exit_code": code})

    def _say(self, event: str, what: Mapping[str, Any]) -> None:
        sys.stdout.write(json.dumps({"event": event, **what}, default=str) + "\n")
        sys.stdout.flush()


def _left(told: str, seconds: float | None) -> str:
    return told if seconds is None else f"{told}  {duration(seconds)} left".strip()
