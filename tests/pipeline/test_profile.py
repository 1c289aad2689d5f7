"""Where time goes: shares that sum to the whole, operations as counted by hand, no byte changed."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from exlq import measurement
from exlq.pipeline import job, kinds
from exlq.pipeline.profile import NO_PROFILE, Recorder
from exlq.pipeline.profiled import Profiled, Rates, work_of
from exlq.pipeline.rates import RateSamples
from tests.pipeline.conftest import Finished
from tests.pipeline.helpers import contents, convert, settings

CPU = torch.device("cpu")
STAGES = ("gradients", "measuring", "allocating exl2", "quantizing exl2", "verifying exl2")
SHOWN = ("seconds", "flop", "floor_s")


class Clock:
    """Shows the time it is set to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def profiled(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The conversion of `finished` once more, watched."""
    config = finished.config
    out = tmp_path_factory.mktemp("profiled") / "out"
    assert config.calibration is not None
    again = settings(config.in_dir, out, config.calibration, profile=True)
    return Finished(again, convert(again))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrix products are taken as done, in no time: one operation a second."""
    monkeypatch.setattr(RateSamples, "take", lambda self: None)
    monkeypatch.setattr(RateSamples, "medians", lambda self: Rates(2.0, 1.0))


def seconds(found: Profiled) -> dict[tuple[str, str], float]:
    return {(stage.name, work.kind): work.seconds for stage in found.stages for work in stage.kinds}


@pytest.mark.usefixtures("quick")
def test_what_stands_inside_other_work_is_counted_once() -> None:
    clock = Clock()
    recorder = Recorder(CPU, clock)
    clock.now = 1
    with recorder.stage("measuring"):
        clock.now = 3
        with recorder.spent(kinds.FORWARDS, 10):
            clock.now = 7
            with recorder.spent(kinds.HESSIANS, 5):
                clock.now = 15
            with recorder.stage("gradients"):
                clock.now = 20
            clock.now = 31
    clock.now = 63
    found = recorder.found()
    assert seconds(found) == {
        ("elsewhere", kinds.REST): 1 + 32,
        ("measuring", kinds.REST): 2,
        ("measuring", kinds.FORWARDS): 4 + 11,
        ("measuring", kinds.HESSIANS): 8,
        ("gradients", kinds.REST): 5,
    }
    assert found.whole.seconds == 63
    assert found.whole.floor_s == 7.5


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("inside_s", "share_s"), [(4.0, 2.0), (30.0, 10.0)])
def test_threads_beside_take_their_share_of_the_work_that_waits_for_them(
    inside_s: float, share_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    clock = Clock()
    recorder = Recorder(CPU, clock)

    def descend() -> None:
        with recorder.spent(kinds.DESCENTS):
            clock.now += inside_s

    with recorder.spent(kinds.TRIALS):
        thread = threading.Thread(target=descend)
        thread.start()
        thread.join()
        clock.now = 10
    found = seconds(recorder.found())
    assert found["elsewhere", kinds.DESCENTS] == pytest.approx(share_s)
    assert found["elsewhere", kinds.TRIALS] == pytest.approx(10 - share_s)


@pytest.mark.usefixtures("quick")
def test_only_the_way_into_a_context_is_reading_and_errors_pass_through() -> None:
    clock, left = Clock(), []

    @contextmanager
    def opened() -> Iterator[str]:
        clock.now += 2
        try:
            yield "a block"
        finally:
            left.append(True)

    recorder = Recorder(CPU, clock)

    def work() -> None:
        with recorder.reading(opened()) as block:
            assert block == "a block"
            clock.now += 3
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert left == [True]
    assert seconds(recorder.found()) == {("elsewhere", kinds.READING): 2, ("elsewhere", kinds.REST): 3}


def test_factors_are_held_against_products_in_float64() -> None:
    rates = Rates(float32=8.0, float64=2.0)
    assert work_of(kinds.FACTORS, 6.0, 4.0, rates).over_floor == 3.0
    assert work_of(kinds.SWEEPS, 6.0, 4.0, rates).over_floor == 12.0
    assert work_of(kinds.REST, 6.0, 0.0, rates).over_floor is None


def test_a_watched_conversion_writes_the_same_bytes(finished: Finished, profiled: Finished) -> None:
    assert contents(finished.model) == contents(profiled.model)
    records = [measurement.load(each.measurement) for each in (finished, profiled)]
    assert records[0].linears == records[1].linears


def test_the_summary_has_a_profile_where_one_was_asked_for(finished: Finished, profiled: Finished) -> None:
    assert "profile" not in finished.summary
    written = json.loads((profiled.config.out_dir / job.SUMMARY).read_text())
    assert written["profile"] == json.loads(json.dumps(profiled.summary["profile"]))
    assert NO_PROFILE.found() is None


def test_kinds_sum_to_stages_and_stages_to_the_whole(profiled: Finished) -> None:
    found = profiled.summary["profile"]
    for name in SHOWN:
        for stage in found["stages"]:
            assert stage[name] == pytest.approx(sum(work[name] for work in stage["kinds"])), stage["stage"]
        assert found[name] == pytest.approx(sum(stage[name] for stage in found["stages"]))


def test_stages_are_those_of_the_summary_with_the_gradients_apart(profiled: Finished) -> None:
    found = {stage["stage"]: stage for stage in profiled.summary["profile"]["stages"]}
    told = profiled.summary["seconds"]
    assert set(found) == {"elsewhere", *STAGES}
    measuring_s = found["measuring"]["seconds"] + found["gradients"]["seconds"]
    assert told["measuring"] / 3 < measuring_s < told["measuring"] + 0.5  # rates are timed between
    for stage in ("allocating", "quantizing", "verifying"):
        assert found[f"{stage} exl2"]["seconds"] == pytest.approx(told[stage], rel=0.1, abs=0.5)
        assert found[f"{stage} exl2"]["peak_anonymous_bytes"] > 1 << 20
        assert found[f"{stage} exl2"]["peak_device_bytes"] is None


def test_operations_are_those_counted_by_hand(profiled: Finished) -> None:
    stages = {
        stage["stage"]: {work["kind"]: work["flop"] for work in stage["kinds"]}
        for stage in profiled.summary["profile"]["stages"]
    }
    tokens = 24 * 64
    weights = 64 * 64 + 2 * 32 * 64 + 64 * 64 + 3 * 64 * 96  # q, k and v, o, gate and up and down
    attention = 2 * 64 * 24 * 64 * 65
    assert stages["measuring"][kinds.FORWARDS] == 2 * (2 * weights * tokens + attention)
    squares = 2 * (3 * 64**2 + 96**2) + 64**2  # inputs of two blocks and of the head
    assert stages["measuring"][kinds.HESSIANS] == tokens * squares
    assert stages["measuring"][kinds.FACTORS] == pytest.approx((2 * (3 * 64**3 + 96**3) + 64**3) / 3)
    quantized_on = (21 + 5) * 64  # three rows of 24 held out; a quarter as many of random tokens beside
    assert stages["quantizing exl2"][kinds.HESSIANS] == quantized_on * squares
    swept = 2 * (64**2 * (64 + 2 * 32 + 64 + 2 * 96) + 96**2 * 64) + 64**2 * 272
    assert stages["quantizing exl2"][kinds.SWEEPS] == swept


def test_rates_are_those_of_matrix_products() -> None:
    samples = RateSamples(CPU)
    samples.take()
    rates = samples.medians()
    assert 1e8 < rates.float64 < 1e14
    assert 1e8 < rates.float32 < 1e14
