"""The benchmark of scale: lines through two runs, and a run of a tiny shape from end to end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from exlq.names import FORMATS
from exlq.pipeline import kinds, trial
from exlq.pipeline.profiled import Place, Profiled, Rates, stages_of
from exlq.pipeline.rates import RateSamples
from exlq.types import Option
from scripts import bench_scale, scale_tables
from scripts.random_llama import Shape, write_model
from scripts.scale_marginal import marginal
from scripts.scale_run import GRADIENTS, MEASURING, Line, Run, extrapolated, run, settings, spread

TINY = Shape(hidden=256, inner=512, heads=4, key_heads=2, blocks=6, vocabulary=256)
RATES = Rates(float32=1e9, float64=1e9)


def made_up(tokens: int, trials_s: float) -> Run:
    """Two blocks that each take a second and a millisecond a token."""
    seconds = {
        Place(MEASURING, kinds.FORWARDS): 2e-3 * tokens,
        Place(MEASURING, kinds.TRIALS): trials_s,
        Place(GRADIENTS, kinds.BACKWARDS): 2e-3 * tokens,
        Place(kinds.ELSEWHERE, kinds.REST): 1000.0,
    }
    flop = {Place(MEASURING, kinds.FORWARDS): 2e6 * tokens / 2, Place(MEASURING, kinds.TRIALS): 1e9}
    profiled = Profiled(stages_of(seconds, flop, RATES, {}, {}), RATES, 1, "cpu")
    return Run(2, {MEASURING: tokens, GRADIENTS: tokens}, profiled, ())


def test_a_whole_model_is_extrapolated_by_blocks_and_tokens() -> None:
    found = extrapolated([made_up(100, 2.0), made_up(300, 0.5)], blocks=10, tokens=100_000)
    assert set(found.works) == {MEASURING, GRADIENTS}
    assert found.stage(GRADIENTS).seconds == pytest.approx(10 * 8.192)  # of 8192 tokens at most
    assert found.of_options_s == pytest.approx(10)  # trials of the run that measured all options
    assert found.stage(MEASURING).seconds == pytest.approx(10 * (100 + 1))
    assert found.stage(MEASURING).floor_s == pytest.approx(10 * (50 + 0.5))
    assert found.doubled_options == pytest.approx((1010 + 81.92 + 10) / (1010 + 81.92))


def test_a_line_has_no_part_below_nothing() -> None:
    assert Line.through([1, 2], [3, 5]) == Line(1, 2)
    assert Line.through([1, 2], [1, 3]) == Line(0, 4 / 3)
    assert Line.through([1, 2], [3, 1]) == Line(2, 0)


def test_some_options_are_from_the_first_to_the_last() -> None:
    options = tuple(Option(str(bits), {}) for bits in range(7))
    assert [option.desc for option in spread(options, 3)] == ["0", "3", "6"]
    assert spread(options, 9) == options
    assert spread(options, 1) == options[:1]


def test_a_tiny_shape_runs_through_its_first_blocks(tmp_path: Path) -> None:
    model, work = tmp_path / "model", tmp_path / "work"
    work.mkdir()
    write_model(model, TINY, 2)
    found = run(settings(model, tmp_path / "out", 256, 128), work, 1, FORMATS, options=2)
    stages = {stage.name: stage for stage in found.profiled.stages}
    assert set(stages) == {kinds.ELSEWHERE, *found.tokens}
    assert found.tokens == {GRADIENTS: 128, MEASURING: 256, "quantizing exl2": 256, "quantizing gguf": 256}
    assert [(mark.stage, mark.blocks) for mark in found.marks] == [(name, 1) for name in found.tokens][1:]
    for name in FORMATS:
        swept = next(work for work in stages[f"quantizing {name}"].kinds if work.kind == kinds.SWEEPS)
        assert swept.flop == 256**2 * (2 * 256 + 2 * 128 + 2 * 512) + 512**2 * 256  # of one block
    twice = replace(found, tokens={name: 2 * n for name, n in found.tokens.items()})
    told = scale_tables.whole(TINY, [found, twice], extrapolated([found, twice], 6, 1024), 1024)
    assert "Extrapolated from 256 and 512 tokens to 6 blocks and 1,024 tokens" in told
    assert scale_tables.by_blocks(TINY, found).count("| measuring |") == 2
    assert scale_tables.by_tokens(TINY, [found, twice]).count("| measuring |") == 2
    assert "(at most 6)" in scale_tables.memory([found], 6_000_000_000)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_its_part_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    threads = str(torch.get_num_threads())
    assert bench_scale.main(["--parts", "gpu", "--threads", threads]) == 0
    assert "No GPU is here" in capsys.readouterr().out


def test_the_floor_of_more_options_is_counted_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RateSamples, "medians", lambda self: Rates(1.0, 1.0))
    found = marginal("gguf", 256, 2, 1)  # Q2_K, with a descent of three walks, and Q8_0, without
    judged = trial.HELDOUT_ROWS
    swept, weighed, walked = 2 * 256**3, 2 * 2 * 256**2 * judged, (1 + 3) * 2 * 256**2 * judged
    assert found.options == 2
    assert found.floor_s == swept + weighed + walked
