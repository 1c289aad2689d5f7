"""How far one model's predictions are from another's, whatever runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from exlq.evaluation.predictor import Blockwise, Logits, Predictor
from exlq.models.model import Model
from exlq.numerics.precision import widest
from exlq.workspace import Workspace

POSITIONS_AT_ONCE = 256  # whose logits are held at once
NOISE_CHUNKS = 2  # run twice to learn the noise of the arithmetic itself


@dataclass(frozen=True)
class Divergence:
    """Figures over all scored tokens; KL divergence of the base's predictions from the other's, in nats.

    `kl_se` is the standard error of the mean over chunks, over tokens where there is but one chunk;
    `noise_floor` the mean KL of the base from itself with its tokens run in other batches: what
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
    """Runs two models in torch on the same chunks, as `against` says.

    Args:
        chunks: (n_chunks, context) int64.
        workspace: holds both models' hidden states meanwhile.
    """
    with against(Blockwise(base, workspace, "base"), chunks) as compared:
        return compared(Blockwise(other, workspace, "other"))


@contextmanager
def against(base: Predictor, chunks: Tensor) -> Iterator[Callable[[Predictor], Divergence]]:
    """A function that compares models with `base`, which stays loaded until the end of the `with`.

    Chunks are taken as llama-perplexity takes them: each alone, its second half scored.

    Args:
        chunks: (n_chunks, context) int64.
    """
    noise = _noise(base, chunks[:NOISE_CHUNKS])
    with base.run(chunks) as base_logits:

        def compared(other: Predictor) -> Divergence:
            with other.run(chunks) as logits:
                scores = [_score(base_logits, logits, chunk, row) for chunk, row in enumerate(chunks)]
            return _Scores.of(scores).summary(chunks, noise)

        yield compared


def _cuts(context: int) -> Iterator[slice]:
    """The scored positions, from the middle to the last that has a next token, in parts."""
    for start in range(context // 2, context - 1, POSITIONS_AT_ONCE):
        yield slice(start, min(start + POSITIONS_AT_ONCE, context - 1))


def _score(base: Logits, other: Logits, chunk: int, row: Tensor) -> Tensor:
    """(4, positions): base's and other's negative log likelihood, KL divergence, whether the best agree."""
    parts = [
        _score_part(base(chunk, cut), other(chunk, cut), row[cut.start + 1 : cut.stop + 1])
        for cut in _cuts(len(row))
    ]
    return torch.cat(parts, dim=1)


def _score_part(base: Tensor, other: Tensor, targets: Tensor) -> Tensor:
    log_p, log_q = base.log_softmax(-1), other.to(base.device).log_softmax(-1)
    index = targets.to(log_p.device).unsqueeze(-1)
    nll = [-x.gather(-1, index).squeeze(-1) for x in (log_p, log_q)]
    same = log_p.argmax(-1) == log_q.argmax(-1)
    return torch.stack([figure.cpu().double() for figure in (*nll, _kl(log_p, log_q), same)])


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """(positions,) KL divergence from (positions, vocab) log probabilities."""
    return torch.sum(log_p.exp() * (log_p - log_q), -1, dtype=widest(log_p.device))


def _noise(base: Predictor, chunks: Tensor) -> float:
    """Mean KL of the base from itself, tokens batched otherwise and probabilities taken in float64."""
    divergences = []
    with base.run(chunks) as usual, base.run(chunks, otherwise=True) as otherwise:
        for chunk in range(len(chunks)):
            for cut in _cuts(chunks.shape[1]):
                log_p = usual(chunk, cut).log_softmax(-1)
                log_q = otherwise(chunk, cut).to(widest(log_p.device)).log_softmax(-1)
                divergences.append(_kl(log_p, log_q).cpu())
    return abs(float(torch.cat(divergences).mean()))


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
