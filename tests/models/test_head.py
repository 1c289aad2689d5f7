"""Logits, labels and gradients of the head, in chunks as in one piece."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.models.conftest import TinyMaker, opened, streamed_states, whole_logits, whole_model

HEAD = "exlq.models.head"


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{HEAD}._WEIGHT_BYTES", 4 * 64 * 50)  # 50 of 272 vocabulary rows
    monkeypatch.setattr(f"{HEAD}._LOGITS_BYTES", 4 * 272 * 7)  # 7 of 72 tokens


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_chunks_change_nothing(tiny: TinyMaker, family: str, rows: Tensor) -> None:
    directory = tiny(family, True)
    model, whole = opened(directory), whole_model(directory)
    *_, last = streamed_states(model, rows)
    assert (model.logits(model.final_norm(last)) - whole_logits(directory, rows)).abs().max() < 1e-5
    leaf = last.clone().requires_grad_()
    logits = whole.lm_head(whole.model.norm(leaf))
    if family == "gemma2":
        logits = (logits / 30).tanh() * 30  # the family's final_logit_softcapping
    labels = rows.roll(-1, 1)
    labels[:, -1] = -100
    (-logits.log_softmax(-1)[:, :-1].gather(-1, labels[:, :-1, None])).sum().backward()
    assert leaf.grad is not None
    assert (model.head_backward(last, labels) - leaf.grad).norm() / leaf.grad.norm() < 1e-4


@pytest.mark.usefixtures("small_chunks")
def test_sampled_labels_follow_the_models_distribution(tiny: TinyMaker, rows: Tensor) -> None:
    model = opened(tiny("qwen3", True))
    *_, last = streamed_states(model, rows)
    state = last[:1, -1:]
    wanted = model.logits(model.final_norm(state)).softmax(-1).flatten()
    n = 20_000
    labels = model.sample_labels(state.expand(1, n, -1), torch.Generator().manual_seed(3))
    counts = labels.flatten().bincount(minlength=len(wanted))
    chi_square = float(((counts - n * wanted) ** 2 / (n * wanted)).sum())
    assert chi_square < 272 + 5 * (2 * 272) ** 0.5


def test_labels_depend_on_the_seed_alone(tiny: TinyMaker, rows: Tensor) -> None:
    model = opened(tiny("llama", False))
    *_, last = streamed_states(model, rows)
    first, again, other = (model.sample_labels(last, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert first.shape == rows.shape
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
