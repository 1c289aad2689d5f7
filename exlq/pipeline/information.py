"""Fisher information of outputs: of linears that every token reaches, of those that some do, of lm_head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from exlq.models.layout import Linear
from exlq.models.model import Model
from exlq.numerics.coupling import CouplingSum
from exlq.numerics.precision import widest

HEAD_TOKENS = 256  # whose probabilities are held at once


def information(
    linears: Sequence[Linear], sums: Mapping[str, CouplingSum], n_tokens: int
) -> dict[str, Tensor]:
    """By key, (out_features,) float32: the mean squared gradient of each output over all `n_tokens` tokens.

    An expert's gradients are zero at the tokens that do not reach it, and so its errors cost what they cost
    these that do. None is below what one token would cost that is like the mean of all tokens at the same
    projection of the block's experts: a token of other text may reach any of them.
    """
    found = {}
    for linear in linears:
        key, total = linear.spec.key, sums.get(linear.spec.key)
        if total is not None and total.n_tokens == n_tokens:
            found[key] = total.fisher()
            continue
        mates = [sums[each.spec.key] for each in linears if each.tie == linear.tie and each.spec.key in sums]
        energy = sum(float(mate.fisher().double().mean()) * mate.n_tokens for mate in mates)
        floor = energy / max(1, sum(mate.n_tokens for mate in mates)) / n_tokens
        own = torch.zeros(linear.spec.out_features) if total is None else total.over(n_tokens).fisher()
        found[key] = own.clamp_min(floor)
    return found


def head_information(model: Model, states: Tensor) -> Tensor:
    """(vocab,) E[p(1-p)]: the expected squared gradient of each logit."""
    total = torch.zeros(model.vocab_size, dtype=torch.float64)
    tokens = states.flatten(0, 1)
    for chunk in torch.split(tokens, HEAD_TOKENS):
        p = model.logits(model.final_norm(chunk)).softmax(-1)
        total += (p * (1 - p)).sum(0, dtype=widest(p.device)).cpu()
    return (total / len(tokens)).float()
