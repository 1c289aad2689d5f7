"""How many threads an operation is worth."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Runs what stands inside on one thread of the CPU.

    An operation of microseconds that is shared among threads ends when the last of them has been
    given a core: on a busy machine that takes a hundred times as long as the operation.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
