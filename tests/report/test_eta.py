"""What is said of the time left, on a clock that is set by hand."""

from __future__ import annotations

import pytest

from exlq.report.eta import Eta, duration


class Clock:
    """Seconds as the test sets them."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_steady_pace_gives_the_rest_exactly() -> None:
    clock = Clock()
    eta = Eta({}, clock)
    for done in range(1, 5):
        clock.now += 3.0
        reading = eta.step("measuring", done, 10)
        assert reading.stage_left_s == pytest.approx(3.0 * (10 - done))
        assert reading.left_s == reading.stage_left_s
        assert reading.share == pytest.approx(done / 10)


def test_later_stages_count_at_the_pace_seen_and_not_at_the_one_expected() -> None:
    clock = Clock()
    eta = Eta({"gradients": 10.0, "measuring": 20.0, "quantizing": 40.0}, clock)
    clock.now += 15.0
    reading = eta.step("gradients", 1, 2)
    assert reading.stage_left_s == pytest.approx(15.0)
    assert reading.left_s == pytest.approx(15.0 + 3 * (20.0 + 40.0))  # 30 s where 10 were expected
    clock.now += 15.0
    eta.step("gradients", 2, 2)
    clock.now += 30.0
    reading = eta.step("measuring", 1, 2)
    assert reading.left_s == pytest.approx(30.0 + 3 * 40.0)
    assert reading.share == pytest.approx(60 / 210)


def test_steps_done_before_a_resume_do_not_count_as_fast_ones() -> None:
    clock = Clock()
    eta = Eta({}, clock)
    for done in range(1, 30):
        clock.now += 0.001
        eta.step("measuring", done, 60)
    for done in range(30, 40):
        clock.now += 2.0
        reading = eta.step("measuring", done, 60)
    assert reading.stage_left_s == pytest.approx(2.0 * 21)


def test_before_its_first_step_a_stage_takes_what_is_expected_or_nobody_knows() -> None:
    clock = Clock()
    assert Eta({"verifying": 7.0}, clock).step("verifying", 0, 1).stage_left_s == 7.0
    assert Eta({}, clock).step("verifying", 0, 1) == (None, None, 0.0)


def test_times_are_said_in_the_unit_a_person_would_take() -> None:
    assert [duration(s) for s in (3.4, 119, 120, 7199, 7200, 100_000)] == [
        "3 s",
        "119 s",
        "2 min",
        "120 min",
        "2.0 h",
        "27.8 h",
    ]
