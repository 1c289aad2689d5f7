"""The numbers behind the plots."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from exlq.allocation import solve
from exlq.measurement import load, to_items
from exlq.recipes.prediction import predicted
from exlq.report.page_source import read_source
from exlq.report.plots import all_plots
from tests.report.page_helpers import BUNDLED, lone_measurement, make_job


def test_the_frontier_is_where_the_exact_solver_gets_to(tmp_path: Path) -> None:
    exl2, _ = all_plots(read_source(lone_measurement(tmp_path)))
    decoder = load(BUNDLED).only(
        lambda linear: ".layers." in linear.key, lambda option: option.format == "exl2"
    )
    items, numel = to_items(decoder), sum(linear.numel for linear in decoder.linears)
    for point in exl2.frontier[:: len(exl2.frontier) // 4]:
        best = predicted(solve(items, math.ceil(point.bpw * numel * (1 + 1e-6))).loss, corrects=True)
        assert best is not None
        assert point.kl == pytest.approx(best.kl, rel=0.01)
        assert point.n_bytes == pytest.approx(point.bpw * numel / 8, rel=1e-5)


def test_the_frontier_passes_through_what_was_solved(tmp_path: Path) -> None:
    """The job's own mix, head included, once it is the solver's."""
    record, bits = load(BUNDLED), 4.5
    job = make_job(tmp_path / "job", ("exl2",))
    own = record.only(lambda linear: ".layers." in linear.key, lambda option: option.format == "exl2")
    numel = sum(linear.numel for linear in own.linears)
    found = solve(to_items(own), int(bits * numel))
    descs = {linear.key: linear.options[found.choice[linear.key]].desc for linear in own.linears}
    (head,) = (linear for linear in record.linears if linear.key == "lm_head")
    option = next(option for option in head.options if option.format == "exl2")
    total = predicted(found.loss + option.loss, corrects=True)
    assert total is not None
    summary = json.loads((job / "summary.json").read_text(encoding="utf-8"))
    summary["outputs"]["exl2"] |= {
        "bpw": found.total_bits / numel,
        "allocation": {**descs, "lm_head": option.desc},
        "predicted_kl": total.kl,
        "predicted_se": total.se,
    }
    (job / "summary.json").write_text(json.dumps(summary), encoding="utf-8")

    (plots,) = all_plots(read_source(job))

    assert plots.chosen is not None
    near = min(plots.frontier, key=lambda point: abs(point.bpw - found.total_bits / numel))
    assert near.kl == pytest.approx(plots.chosen.kl, rel=0.02)
    assert near.n_bytes == pytest.approx(plots.chosen.n_bytes, rel=0.01)


def test_losses_that_are_no_divergence_give_no_frontier(tmp_path: Path) -> None:
    file = lone_measurement(tmp_path)
    stored = json.loads(file.read_text(encoding="utf-8"))
    for linear in stored["measurement"]:
        linear.pop("sensitivity")
    file.write_text(json.dumps(stored), encoding="utf-8")
    for plots in all_plots(read_source(file)):
        assert not plots.is_kl
        assert plots.frontier == ()
        assert any(linear.chosen is not None for linear in plots.linears)


def test_linears_have_their_layer_kind_and_the_option_chosen(tmp_path: Path) -> None:
    exl2, gguf = all_plots(read_source(make_job(tmp_path / "job")))
    first, *_ = exl2.linears
    assert (first.key, first.layer, first.kind) == ("model.layers.0.self_attn.q_proj", 0, "q_proj")
    for linear in (*exl2.linears, *gguf.linears):
        assert linear.chosen is not None
        assert linear.options[linear.chosen].desc == linear.desc
    assert {linear.kind for linear in exl2.linears if linear.layer is None} >= {"lm_head"}
    assert [each.name for each in gguf.evaluations] == ["-b 3.0 -hb 6", "-b 4.5 -hb 6"]
