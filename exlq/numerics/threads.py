"""How many threads an operation is worth."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


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


def in_parallel(
    function: Callable[[Item], Result], items: Sequence[Item], device: torch.device
) -> list[Result]:
    """`function` of every item, in their order; the results do not depend on the number of threads.

    On a CPU whose threads the items can all keep busy, each thread takes items of its own: what
    cannot be shared among threads is then done side by side. Otherwise one item after the other.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or len(items) < threads:
        return [function(item) for item in items]
    with one_thread(), ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, items))
