"""The embedding as a matrix to be quantized: what its errors cost, row by row and channel by channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from exlq.formats.codec import Codec
from exlq.models.model import Model
from exlq.numerics import hessian
from exlq.numerics.hessian import energies
from exlq.pipeline import arithmetic, kinds, trial
from exlq.pipeline.plan import Plan
from exlq.pipeline.sensitivity import Sensitivity
from exlq.types import Option

UNSEEN = 1.0  # what is added to every token's count: one that never occurred may yet


@dataclass(frozen=True)
class EmbeddingCost:
    """The Hessian over the embedding's channels, and the weight of each of its rows; nats per token."""

    hessian: Tensor  # (hidden, hidden) float32
    rows: Tensor  # (vocab,) float32


def embedding_cost(model: Model, found: Sensitivity, ids: Tensor) -> EmbeddingCost:
    """What an error of the stored embedding costs; where it also is the head, in both its roles.

    A row's error costs half of its row weight times eᵀHe. As a token's embedding it costs by the
    token's frequency in `ids` and the gradients' second moment; as a row of the head by E[p(1 - p)] and
    the second moment of the head's input. The two Hessians are added in proportion to their mean
    weight, and a row's weight is the mean of its two relative weights, each by its part in the whole.
    """
    counts = torch.bincount(ids.flatten(), minlength=model.vocab_size).double() + UNSEEN
    frequency = (counts / counts.sum()).float()
    if not model.tied:
        return EmbeddingCost(found.embedding, frequency)
    weight = model.linear_weight(model.head.key).float().T  # (hidden, vocab)
    roles = ((found.embedding, frequency), (found.head_input, found.outputs[model.head.key]))
    hessian = sum((h * rows.mean() for h, rows in roles), torch.zeros_like(found.embedding))
    parts = torch.stack([_mean_energy(model, weight, h) * rows.mean() for h, rows in roles])
    parts = parts / parts.sum()
    relative = sum(
        (part * rows / rows.mean() for part, (_, rows) in zip(parts, roles, strict=True)),
        torch.zeros_like(frequency),
    )
    return EmbeddingCost(hessian, relative)


def _mean_energy(model: Model, weight: Tensor, hessian: Tensor) -> Tensor:
    """Of every row of the embedding, (hidden, vocab), under (hidden, hidden); computed on the device."""
    return energies(weight.to(model.device), hessian.to(model.device)).mean().cpu()


def quantized_embedding(
    plan: Plan, codec: Codec[Any], option: Option, found: Sensitivity
) -> tuple[dict[str, Tensor], Tensor]:
    """The embedding's stored tensors, and the (vocab, hidden) float32 that they give back."""
    model = plan.model
    cost = embedding_cost(model, found, plan.measurement_rows.ids)
    factor = hessian.factor(cost.hessian.to(model.device))
    factor = factor if plan.config.gptq else factor.without_feedback()
    weight = model.linear_weight(model.embedding_key)
    with plan.profile.spent(kinds.SWEEPS, arithmetic.rounding(model.embedding)):
        return trial.quantize(plan.profile.codec(codec), model.embedding, option, weight, factor)
