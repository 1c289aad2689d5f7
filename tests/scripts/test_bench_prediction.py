"""The correlation, and the divergence of one changed linear, against transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor
from transformers import AutoModelForCausalLM

from exlq.checkpoint.open import open_checkpoint
from exlq.models.open import open_model
from scripts.bench_prediction import Base, Change, report, spearman


def test_the_rank_correlation_is_that_of_scipy() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 50, generator=generator, dtype=torch.float64)
    right = right + left
    expected = float(spearmanr(left, right).statistic)
    assert spearman(left.tolist(), right.tolist()) == pytest.approx(expected, abs=1e-12)


def divergence(directory: Path, key: str, weight: Tensor, chunks: Tensor) -> Tensor:
    """(chunks,) mean KL divergence over all but the last position, by transformers in float64."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
    with torch.no_grad():
        log_p = model(chunks).logits[:, :-1].log_softmax(-1)
        model.get_submodule(key).weight.copy_(weight)
        log_q = model(chunks).logits[:, :-1].log_softmax(-1)
    kl: Tensor = (log_p.exp() * (log_p - log_q)).sum(-1)
    return kl.mean(1)


@pytest.mark.parametrize("size", [1e-1, 1e-3])
def test_the_divergence_of_one_changed_linear_is_that_of_transformers(tiny_llama: Path, size: float) -> None:
    model = open_model(tiny_llama, open_checkpoint(tiny_llama), device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    chunks = torch.randint(model.vocab_size, (3, 40), generator=generator)
    linear = model.linears(1)[2]
    weight = model.linear_weight(linear.spec.key).float()
    changed = weight + size * weight.std() * torch.randn(weight.shape, generator=generator)

    found = Base.of(model, chunks, start=0).divergence(linear, changed)

    expected = divergence(tiny_llama, linear.spec.key, changed.double(), chunks)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0.0)


def test_the_noise_is_far_below_the_divergences_of_four_bits(tiny_llama: Path) -> None:
    model = open_model(tiny_llama, open_checkpoint(tiny_llama), device=torch.device("cpu"))
    chunks = torch.randint(model.vocab_size, (2, 40), generator=torch.Generator().manual_seed(2))
    assert Base.of(model, chunks).noise() < 1e-9


def test_the_report_asks_for_the_correlation_within_one_option_too(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Options far apart give a high correlation over all, whatever becomes of the linears."""
    same = [Change(f"linear.{i}", "2b", 1.0 + i, 1.0 + i, 0.1) for i in range(9)]
    mixed = [Change(f"linear.{i}", "4b", 0.1 + i / 100, 0.2 - (i % 3) / 100, 0.1) for i in range(9)]
    assert report("exl2", same)
    assert not report("exl2", same + mixed)
    assert "| 4b | 9 |" in capsys.readouterr().out
