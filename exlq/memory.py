"""How much memory of its own this process holds."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from pathlib import Path

INTERVAL_S = 0.01


def anonymous_bytes() -> int:
    """RssAnon of this process: memory that no file backs. 0 where the system does not tell (not Linux)."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def release() -> None:
    """Hands memory that is free but kept by the C library back to the system, where that is glibc.

    Tensors of a few megabytes that come and go leave its heap full of holes, which it keeps.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


class PeakMemory:
    """The most anonymous memory held inside a `with`, sampled a hundred times a second."""

    def __init__(self) -> None:
        self.before = self.bytes = anonymous_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(INTERVAL_S):
            self.bytes = max(self.bytes, anonymous_bytes())
