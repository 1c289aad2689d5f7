"""The arithmetic floor of what a conversion does, from the tensors it does it with."""

from __future__ import annotations

from torch import Tensor

from exlq.models.model import Model
from exlq.numerics.coupling import RUN
from exlq.pipeline.trial import HELDOUT_ROWS, SAMPLED_ROWS
from exlq.sizing import flops
from exlq.types import LinearSpec


def forward(model: Model, index: int, states: Tensor) -> float:
    """Operations of block `index` on states, (rows, length, hidden_size)."""
    rows, length = states.shape[:2]
    return flops.block((linear.spec for linear in model.linears(index)), rows, length, model.share)


def backward(model: Model, index: int, states: Tensor) -> float:
    """Likewise, forward again and back."""
    rows, length = states.shape[:2]
    return flops.block_backward((linear.spec for linear in model.linears(index)), rows, length, model.share)


def head(model: Model, states: Tensor, times: int = 1) -> float:
    """Operations of lm_head on states, (..., hidden_size), taken so many times."""
    return times * flops.forward(model.head.numel, states.shape[:-1].numel())


def comparison(model: Model, rows: Tensor) -> float:
    """Operations of running two models on rows, (n, length); logits of every row's second half."""
    blocks = sum(forward(model, index, rows) for index in range(model.n_blocks))
    return 2 * blocks + 2 * flops.forward(model.head.numel, len(rows) * (rows.shape[1] // 2))


def moment(x: Tensor) -> float:
    """Operations of the second moment of tokens x, (..., size)."""
    return flops.second_moment(x.shape[-1], x.shape[:-1].numel())


def coupling(gradient: Tensor) -> float:
    """Operations of the second moments of gradients, (..., outputs), within runs of outputs."""
    runs, last = divmod(gradient.shape[-1], RUN)
    tokens = gradient.shape[:-1].numel()
    return runs * flops.second_moment(RUN, tokens) + flops.second_moment(last, tokens)


def drift(x: Tensor, stream: Tensor | None, judged: bool) -> float:
    """Operations of the drift's sums over tokens x, (..., size); `stream` is (..., residual).

    None of tokens that are kept to judge by.
    """
    if judged:
        return 0.0
    other = x.shape[-1] + (0 if stream is None else stream.shape[-1])
    return flops.cross_moment(x.shape[-1], other, x.shape[:-1].numel())


def correction(spec: LinearSpec) -> float:
    """Operations of making a linear make up for drift; learning how much of that holds is not counted."""
    return flops.correction(spec.in_features, spec.out_features)


def trials(spec: LinearSpec, n_options: int) -> float:
    """Operations of trying options on a linear: all rows weighed, a sample of them swept."""
    rows = min(spec.out_features, SAMPLED_ROWS)
    judged = -(-rows // max(1, rows // HELDOUT_ROWS))
    swept = flops.trials(spec.in_features, rows, judged, n_options)
    return swept + flops.factored_energies(spec.in_features, spec.out_features)


def rounding(spec: LinearSpec) -> float:
    """Operations of the sweeps that round a linear for good."""
    return flops.sweep(spec.in_features, spec.out_features)
