"""What an allocation lets expect, from the sum of its losses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from exlq.pipeline.config import ConvertConfig, Methods
from exlq.recipes.prediction import predicted

CONFIG = ConvertConfig(Path("model"), Path("out"), bits=4.0)


def test_nothing_measured_lets_nothing_be_expected() -> None:
    assert predicted(None, True) is None


@pytest.mark.parametrize("loss", [1e-6, 1e-3, 0.05])
def test_made_up_errors_bring_less(loss: float) -> None:
    corrected = predicted(loss, CONFIG.corrects)
    plain = predicted(loss, replace(CONFIG, methods=Methods(input_correction=False)).corrects)
    rounded = predicted(loss, replace(CONFIG, gptq=False).corrects)
    assert corrected is not None
    assert plain is not None
    assert corrected.kl < plain.kl
    assert rounded == plain
    assert plain.kl >= loss


def test_small_errors_add_up_and_large_ones_bring_more() -> None:
    small, large = predicted(1e-8, True), predicted(1e-2, True)
    assert small is not None
    assert large is not None
    assert large.kl > 1e6 * small.kl
    assert large.kl / 5 < large.se < large.kl
