"""One mutant after another under a clock, with the memory of each held against what was there before."""

from __future__ import annotations

import faulthandler
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from exlq.errors import InputError
from tests.fuzz.kinds import Kind
from tests.fuzz.valid import Valid

MOST_SECONDS, MOST_BYTES = 10, 1_000_000_000
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Tally:
    """What became of the mutants of one kind; `faults` says how to make each again."""

    tried: int = 0
    past_first: int = 0
    done: int = 0
    refused: int = 0
    slowest: float = 0.0
    most_bytes: int = 0
    faults: list[str] = field(default_factory=list)

    @property
    def share(self) -> float:
        return self.past_first / max(1, self.tried)


class TooSlowError(BaseException):
    """No Exception, so that nothing takes it for an error of its own."""


def attack(kind: Kind, valid: Valid, seed: int, tally: Tally) -> None:
    """One mutant through every function of its kind; each must succeed or refuse in one line."""
    path = kind.make(valid, random.Random(seed))
    tally.tried += 1
    with suppress(Exception):
        kind.first(path)
        tally.past_first += 1
    for use in kind.uses:
        outcome = watched(lambda use=use: use(path, valid), tally)  # type: ignore[misc]
        if isinstance(outcome, InputError) and "\n" not in str(outcome):
            tally.refused += 1
        elif outcome is None:
            tally.done += 1
        else:
            name = getattr(use, "__name__", "?")
            tally.faults.append(f"seed {seed}, {name}: {type(outcome).__name__}: {str(outcome)[:200]}")


def watched(work: Callable[[], Any], tally: Tally) -> BaseException | None:
    """What the work raised; too much time or memory is a fault in the tally."""
    before, begin = _memory("VmRSS"), time.monotonic()
    with suppress(OSError):
        RESET.write_text("5", encoding="ascii")
    try:
        with _clock():
            work()
        outcome = None
    except KeyboardInterrupt:
        raise
    except BaseException as exc:
        outcome = exc
    taken, grown = time.monotonic() - begin, _memory("VmHWM") - before
    tally.slowest, tally.most_bytes = max(tally.slowest, taken), max(tally.most_bytes, grown)
    if taken > MOST_SECONDS or grown > MOST_BYTES:
        tally.faults.append(f"{taken:.1f} s and {grown:,} bytes, ended in {outcome!r:.200}")
    return outcome


def one_each(faults: list[str]) -> list[str]:
    """The first of each sort."""
    return [f"{n} × {fault}" for fault, n in Counter(faults).most_common(10)]


@contextmanager
def _clock() -> Iterator[None]:
    """TooSlowError in Python code; a library that never comes back ends the process with all tracebacks."""

    def ring(_number: int, _frame: FrameType | None) -> None:
        raise TooSlowError(f"not done in {MOST_SECONDS} s")

    if not hasattr(signal, "SIGALRM"):
        yield
        return
    former = signal.signal(signal.SIGALRM, ring)
    assert sys.__stderr__ is not None
    signal.alarm(MOST_SECONDS + 1)
    faulthandler.dump_traceback_later(6 * MOST_SECONDS, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, former)


def _memory(what: str) -> int:
    """Bytes of this process, 0 where the system does not tell."""
    if not STATUS.exists() or not RESET.exists():
        return 0
    lines = STATUS.read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{what}:"))
