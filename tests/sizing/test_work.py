"""What a conversion takes, and how much text it takes it for."""

from __future__ import annotations

import pytest

from exlq.calibration.rows import DEFAULT_LENGTH, HELDOUT_EVERY, MINIMUM_ROWS
from exlq.numerics import coupling
from exlq.pipeline import parts, sensitivity, trial
from exlq.sizing import advice, effort, work
from exlq.sizing.advice import advise
from exlq.sizing.fitting import Room
from tests.sizing.helpers import published


def test_the_figures_are_those_of_the_modules_that_do_the_work() -> None:
    assert sensitivity.TOKENS == work.GRADIENT_TOKENS
    assert (trial.SAMPLED_ROWS, parts.SWEEP_BYTES) == (work.SAMPLED_ROWS, work.SWEEP_BYTES)
    assert trial.SAMPLED_ROWS // trial.HELDOUT_ROWS == work.JUDGED_EVERY
    assert coupling.RUN == work.COUPLED_ROWS
    assert advice.HELDOUT_EVERY == HELDOUT_EVERY
    assert (effort.ROW_LENGTH, effort.LEAST_ROWS) == (DEFAULT_LENGTH, MINIMUM_ROWS)


def test_normal_effort_is_what_it_always_was() -> None:
    assert effort.EFFORTS["normal"] == (204_800, 32_768, True)
    assert effort.rows_of(204_800, 2048) == 100
    assert effort.rows_of(8192, 2048) == 8


@pytest.mark.parametrize("name", ["Llama-3.1-8B", "gemma-2-2b"])
def test_more_effort_takes_more(name: str) -> None:
    shape = published(name)
    costs = advise(shape, Room(32 << 30, 4096), 1e11).costs
    assert [cost.effort for cost in costs] == ["quick", "normal", "best"]
    for figure in ("quantize_tokens", "measure_tokens", "total_s", "measuring_s", "disk_bytes"):
        found = [getattr(cost, figure) for cost in costs]
        assert found == sorted(set(found)), figure
    assert all(sum(cost.stages_s.values()) == cost.total_s for cost in costs)
    assert list(costs[0].stages_s)[:2] == ["gradients", "measuring"]


def test_time_goes_with_the_rate_where_products_are_slow() -> None:
    shape, room = published("Llama-3.1-8B"), Room(32 << 30, 4096)
    slow, fast = (advise(shape, room, rate).costs[1].total_s for rate in (1e8, 1e10))
    assert slow == pytest.approx(100 * fast, rel=0.05)


def test_the_product_rate_is_within_reason() -> None:
    assert 1e8 < work.gemm_rate() < 1e14
