"""How long work in stages will still take, from what was expected and what is seen."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import NamedTuple

RECENT = 8  # steps whose mean is the pace of a stage


class Reading(NamedTuple):
    """Seconds to the end of the stage and of everything, None while unknown; the share that is done."""

    stage_left_s: float | None
    left_s: float | None
    share: float


class Eta:
    """Told of every step. Stages take turns; the one told of last is the one that runs.

    What is left of the running stage follows from its recent steps, what later stages take from what was
    expected of them, scaled by how wrong the expectation of those before was.

    Args:
        expected: seconds by stage, in order; a stage not listed counts from when it begins.
        clock: seconds that only rise.
    """

    def __init__(self, expected: Mapping[str, float], clock: Callable[[], float]) -> None:
        self._expected = dict(expected)
        self._clock = clock
        self._begun = self._stage_begun = self._before = clock()
        self._stage = ""
        self._steps: deque[float] = deque(maxlen=RECENT)
        self._taken: dict[str, float] = {}  # by the stages that have ended

    def step(self, stage: str, done: int, total: int) -> Reading:
        """What is left after the step that has just ended."""
        now = self._clock()
        if stage != self._stage:
            self._change(stage)
        if done > 0:
            self._steps.append(now - self._before)
        self._before = now
        stage_left = None
        if self._steps:
            stage_left = (total - done) * sum(self._steps) / len(self._steps)
        elif stage in self._expected:
            stage_left = self._expected[stage]
        if stage_left is None:
            return Reading(None, None, 0.0)
        left = stage_left + self._later(stage, now - self._stage_begun + stage_left)
        share = (now - self._begun) / max(now - self._begun + left, 1e-9)
        return Reading(stage_left, left, share)

    def _change(self, stage: str) -> None:
        """The running stage ends where its last step did."""
        if self._stage:
            self._taken[self._stage] = self._before - self._stage_begun
        self._stage, self._stage_begun = stage, self._before
        self._steps.clear()

    def _later(self, stage: str, stage_s: float) -> float:
        """Seconds of the stages that have not begun."""
        waiting = [s for name, s in self._expected.items() if name not in self._taken and name != stage]
        seen = {**self._taken, stage: stage_s}
        expected = sum(self._expected[name] for name in seen if name in self._expected)
        taken = sum(seconds for name, seconds in seen.items() if name in self._expected)
        return sum(waiting) * (taken / expected if expected > 0 else 1.0)


def duration(seconds: float) -> str:
    """A time as people say it: `45 s`, `12 min`, `3.5 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
