"""Figures of two models against transformers' whole models, in float64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from exlq.evaluation import divergence, predictor
from exlq.evaluation.divergence import Divergence, compare
from exlq.workspace import Workspace
from tests.models.conftest import opened, whole_logits
from tests.pipeline.conftest import TinyMaker
from tests.pipeline.helpers import perturbed

FAMILIES = ["llama", "gemma2", "qwen2"]


class Pair(NamedTuple):
    base: Path
    other: Path


@pytest.fixture(scope="module")
def chunks() -> Tensor:
    return torch.randint(4, 260, (6, 40), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tiny: TinyMaker, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A model and a noisy copy of it."""
    base = tiny(request.param, True)
    return Pair(base, perturbed(base, tmp_path_factory.mktemp("noisy") / "model", 0.05))


class Oracle(NamedTuple):
    """(chunks, positions) each."""

    nll: Tensor
    nll_base: Tensor
    kl: Tensor
    same: Tensor


def oracle(pair: Pair, chunks: Tensor) -> Oracle:
    """Straight from the whole models' logits: positions n/2 to n-2, each predicting the next."""
    n = chunks.shape[1]
    log_p, log_q = (whole_logits(path, chunks).double().log_softmax(-1) for path in pair)
    positions = torch.arange(n // 2, n - 1)
    target = chunks[:, positions + 1].unsqueeze(-1)
    log_p, log_q = log_p[:, positions], log_q[:, positions]
    return Oracle(
        nll=-log_q.gather(-1, target).squeeze(-1),
        nll_base=-log_p.gather(-1, target).squeeze(-1),
        kl=(log_p.exp() * (log_p - log_q)).sum(-1),
        same=(log_p.argmax(-1) == log_q.argmax(-1)).double(),
    )


def run(pair: Pair, chunks: Tensor, scratch: Path) -> Divergence:
    return compare(opened(pair.base), opened(pair.other), chunks, Workspace(scratch))


def test_every_figure_is_that_of_the_whole_models(pair: Pair, chunks: Tensor, tmp_path: Path) -> None:
    found, wanted = run(pair, chunks, tmp_path), oracle(pair, chunks)
    assert (found.n_chunks, found.context, found.n_tokens) == (6, 40, 6 * 19)
    assert found.perplexity == pytest.approx(float(wanted.nll.mean().exp()), rel=1e-5)
    assert found.perplexity_base == pytest.approx(float(wanted.nll_base.mean().exp()), rel=1e-5)
    assert found.kl_mean == pytest.approx(float(wanted.kl.mean()), rel=1e-4)
    assert found.kl_median == pytest.approx(sorted(wanted.kl.flatten().tolist())[56], rel=1e-3)
    assert found.kl_p99 == pytest.approx(sorted(wanted.kl.flatten().tolist())[112], rel=1e-3)
    assert found.top1_agreement == pytest.approx(float(wanted.same.mean()), abs=1e-12)
    assert found.kl_se == pytest.approx(float(wanted.kl.mean(1).std() / math.sqrt(6)), rel=1e-3)
    assert found.kl_mean > 0.001
    assert 0 < found.top1_agreement < 1


def test_a_model_does_not_diverge_from_itself(pair: Pair, chunks: Tensor, tmp_path: Path) -> None:
    found = run(Pair(pair.base, pair.base), chunks, tmp_path)
    assert found.kl_mean == found.kl_median == found.kl_p99 == found.kl_se == 0
    assert found.top1_agreement == 1
    assert found.perplexity == found.perplexity_base


def test_the_pieces_it_works_in_do_not_matter(
    pair: Pair, chunks: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(pair, chunks, tmp_path)
    monkeypatch.setattr(predictor, "TOKENS_AT_ONCE", 90)
    monkeypatch.setattr(divergence, "POSITIONS_AT_ONCE", 7)
    pieces = run(pair, chunks, tmp_path)
    assert pieces.n_tokens == whole.n_tokens
    assert pieces.kl_mean == pytest.approx(whole.kl_mean, rel=1e-4)
    assert pieces.perplexity == pytest.approx(whole.perplexity, rel=1e-6)
    assert pieces.top1_agreement == whole.top1_agreement


def test_the_noise_floor_is_far_below_what_is_measured(pair: Pair, chunks: Tensor, tmp_path: Path) -> None:
    found = run(pair, chunks, tmp_path)
    assert 0 <= found.noise_floor < 1e-6 < found.kl_mean


def test_one_chunk_is_enough_for_every_figure(pair: Pair, chunks: Tensor, tmp_path: Path) -> None:
    found, wanted = run(pair, chunks[:1], tmp_path), oracle(pair, chunks[:1])
    assert found.kl_se == pytest.approx(float(wanted.kl.std() / math.sqrt(19)), rel=1e-3)


def test_an_odd_context_is_scored_from_its_half_rounded_down(
    pair: Pair, chunks: Tensor, tmp_path: Path
) -> None:
    odd = chunks[:, :39]
    found, wanted = run(pair, odd, tmp_path), oracle(pair, odd)
    assert found.n_tokens == wanted.kl.numel() == 6 * 19
    assert found.perplexity == pytest.approx(float(wanted.nll.mean().exp()), rel=1e-5)


def test_no_working_file_is_left(pair: Pair, chunks: Tensor, tmp_path: Path) -> None:
    run(pair, chunks, tmp_path)
    assert not list(tmp_path.iterdir())
