"""How far one model's predictions are from another's, both run block by block in float32."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from exlq.models import Model
from exlq.numerics.precision import widest
from exlq.workspace import Workspace

TOKENS_AT_ONCE = 2048  # through a block
POSITIONS_AT_ONCE = 256  # whose logits are held at once
NOISE_CHUNKS = 2  # run twice to learn the noise of the arithmetic itself


@dataclass(frozen=True)
class Divergence:
    """Figures over all scored tokens; KL divergence of the base's predictions from the other's, in nats.

    `kl_se` is the standard error of the mean over chunks, over tokens where there is but one chunk;
    `noise_floor` the mean KL of the base from itself with its rows run in other batches: what
    arithmetic alone brings forth.
    """

    n_tokens: int
    n_chunks: int
    context: int
    perplexity_base: float
    perplexity: float
    kl_mean: float
    kl_se: float
    kl_median: float
    kl_p99: float
    top1_agreement: float
    noise_floor: float


def compare(base: Model, other: Model, chunks: Tensor, workspace: Workspace) -> Divergence:
    """Runs both models on the same chunks, as llama-perplexity does: each alone, its second half scored.

    Args:
        chunks: (n_chunks, context) int64.
        workspace: holds both models' hidden states meanwhile.
    """
    noise = _noise(base, chunks[:NOISE_CHUNKS], workspace)
    states = [
        final_states(model, chunks, workspace, name) for name, model in (("base", base), ("other", other))
    ]
    scores = _Scores.of([_score(base, other, *pair) for pair in _scored(states, chunks)])
    workspace.remove("base")
    workspace.remove("other")
    return scores.summary(chunks, noise)


def final_states(
    model: Model, rows: Tensor, workspace: Workspace, name: str, at_once: int | None = None
) -> Tensor:
    """(n_rows, length, hidden_size) float32 hidden states after the last block, before the norm."""
    states = workspace.tensor(name, (*rows.shape, model.hidden_size))
    size = at_once or max(1, TOKENS_AT_ONCE // rows.shape[1])
    batches = [slice(start, start + size) for start in range(0, len(rows), size)]
    for batch in batches:
        states[batch] = model.embed(rows[batch]).cpu()
    for index in range(model.n_blocks):
        with model.block(index) as block:
            for batch in batches:
                states[batch] = block.forward(states[batch]).cpu()
    return states


def _scored(states: list[Tensor], chunks: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Chunk by chunk: both models' states at the scored positions, and the tokens that follow them."""
    first = chunks.shape[1] // 2
    for base, other, chunk in zip(*states, chunks, strict=True):
        yield base[first:-1], other[first:-1], chunk[first + 1 :]


def _score(base: Model, other: Model, base_states: Tensor, other_states: Tensor, targets: Tensor) -> Tensor:
    """(4, positions): base's and other's negative log likelihood, KL divergence, whether the best agree."""
    parts = [
        _score_part(base, other, base_states[cut], other_states[cut], targets[cut])
        for start in range(0, len(targets), POSITIONS_AT_ONCE)
        for cut in [slice(start, start + POSITIONS_AT_ONCE)]
    ]
    return torch.cat(parts, dim=1)


def _score_part(
    base: Model, other: Model, base_states: Tensor, other_states: Tensor, targets: Tensor
) -> Tensor:
    log_p = base.logits(base.final_norm(base_states)).log_softmax(-1)
    log_q = other.logits(other.final_norm(other_states)).log_softmax(-1)
    index = targets.to(log_p.device).unsqueeze(-1)
    nll = [-x.gather(-1, index).squeeze(-1) for x in (log_p, log_q)]
    same = log_p.argmax(-1) == log_q.argmax(-1)
    return torch.stack([figure.cpu().double() for figure in (*nll, _kl(log_p, log_q), same)])


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """(positions,) KL divergence from (positions, vocab) log probabilities."""
    return torch.sum(log_p.exp() * (log_p - log_q), -1, dtype=widest(log_p.device))


def _noise(base: Model, chunks: Tensor, workspace: Workspace) -> float:
    """Mean KL of the base from itself, rows batched otherwise and probabilities taken in float64."""
    alone = final_states(base, chunks, workspace, "noise-alone", at_once=1)
    together = final_states(base, chunks, workspace, "noise-together", at_once=len(chunks))
    divergences = []
    for one, other, _ in _scored([alone, together], chunks):
        log_p = base.logits(base.final_norm(one)).log_softmax(-1)
        divergences.append(
            _kl(log_p, base.logits(base.final_norm(other)).to(widest(log_p.device)).log_softmax(-1)).mean()
        )
    workspace.remove("noise-alone")
    workspace.remove("noise-together")
    return abs(float(torch.stack(divergences).mean()))


@dataclass(frozen=True)
class _Scores:
    by_chunk: Tensor  # (4, chunks, positions) float64

    @classmethod
    def of(cls, chunks: list[Tensor]) -> _Scores:
        return cls(torch.stack(chunks, dim=1))

    def summary(self, chunks: Tensor, noise: float) -> Divergence:
        nll_base, nll, kl, same = self.by_chunk
        means = kl.mean(1) if len(kl) > 1 else kl[0]
        spread = float(means.std(correction=min(1, len(means) - 1))) / len(means) ** 0.5
        return Divergence(
            n_tokens=kl.numel(),
            n_chunks=len(chunks),
            context=chunks.shape[1],
            perplexity_base=float(nll_base.mean().exp()),
            perplexity=float(nll.mean().exp()),
            kl_mean=float(kl.mean()),
            kl_se=spread,
            kl_median=float(kl.median()),
            kl_p99=_p99(kl),
            top1_agreement=float(same.mean()),
            noise_floor=noise,
        )


def _p99(values: Tensor) -> float:
    """The 99th percentile; torch's own quantile has a limit on its input's size."""
    ordered = values.flatten().sort().values
    return float(ordered[round(0.99 * (len(ordered) - 1))])
