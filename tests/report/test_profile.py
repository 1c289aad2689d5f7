"""The table of where the time went, on a terminal and in the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from exlq.errors import InputError
from exlq.pipeline import kinds
from exlq.pipeline.profiled import Place, Profiled, Rates, stages_of
from exlq.report.page import write_report
from exlq.report.profile import profile_rows, profile_table
from tests.report.helpers import shown
from tests.report.page_helpers import make_job

TITLE = "Where the time went"


def made_up() -> dict[str, Any]:
    """Two stages; a product of float32 takes a nanosecond for each of 100 operations."""
    rates = Rates(float32=1e11, float64=5e10)
    seconds = {
        Place("measuring", kinds.REST): 1.0,
        Place("measuring", kinds.FORWARDS): 3.0,
        Place("quantizing exl2", kinds.FACTORS): 4.0,
    }
    flop = {Place("measuring", kinds.FORWARDS): 2e11, Place("quantizing exl2", kinds.FACTORS): 5e10}
    stages = stages_of(seconds, flop, rates, {"measuring": 3 << 30}, {"measuring": 5 << 30})
    return Profiled(stages, rates, 2, "cuda").as_json()


def test_every_row_holds_seconds_against_the_floor() -> None:
    rows = {row[0].strip(): row[1:] for row in profile_rows(made_up())}
    assert rows["forwards"] == ("3.00", "2.00", "1.50", "66.7", "")
    assert rows["factors"] == ("4.00", "1.00", "4.00", "12.5", "")
    assert rows["the rest"] == ("1.00", "—", "—", "—", "")
    assert rows["measuring"] == ("4.00", "2.00", "2.00", "50.0", "3.00 GiB, 5.00 GiB on the GPU")
    assert rows["all"] == ("8.00", "3.00", "2.67", "31.2", "")


def test_a_terminal_is_told_what_the_floor_is_taken_at() -> None:
    told = shown(profile_table(made_up()))
    assert TITLE in told
    assert "100 GFLOP/s, factors at 50" in " ".join(told.split())


def test_the_page_has_the_table_only_where_there_is_a_profile(tmp_path: Path) -> None:
    with_it = write_report(make_job(tmp_path / "with", profile=made_up())).read_text(encoding="utf-8")
    without = write_report(make_job(tmp_path / "without")).read_text(encoding="utf-8")
    assert TITLE in with_it
    assert '<th scope="row">  forwards</th><td>3.00</td>' in with_it
    assert TITLE not in without


def test_a_profile_that_lacks_something_is_refused(tmp_path: Path) -> None:
    broken = made_up()
    del broken["stages"][0]["kinds"][0]["seconds"]
    with pytest.raises(InputError, match="lacks 'seconds'"):
        write_report(make_job(tmp_path / "broken", profile=broken))
