"""Work shared among threads gives what one thread gives."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from exlq.numerics.threads import in_parallel, one_thread

CPU = torch.device("cpu")


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_inside_there_is_one_thread_and_outside_as_many_as_before() -> None:
    with one_thread():
        assert torch.get_num_threads() == 1
    with pytest.raises(ZeroDivisionError), one_thread():
        raise ZeroDivisionError
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_results_come_in_the_order_of_the_items_from_threads_of_one_thread_each() -> None:
    meeting = threading.Barrier(2, timeout=10)  # passed only if two items are worked on at once

    def work(item: int) -> tuple[int, int]:
        meeting.wait()
        return item, torch.get_num_threads()

    assert in_parallel(work, range(6), CPU) == [(item, 1) for item in range(6)]
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_too_few_items_for_the_threads_go_one_after_the_other() -> None:
    assert in_parallel(lambda item: (item, torch.get_num_threads()), [7], CPU) == [(7, 2)]


@pytest.mark.usefixtures("two_threads")
def test_an_error_in_a_thread_is_the_callers() -> None:
    with pytest.raises(ZeroDivisionError):
        in_parallel(lambda item: 1 // item, [1, 0, 2], CPU)
    assert torch.get_num_threads() == 2
