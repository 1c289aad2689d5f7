"""One linear rounded: by many options to learn their errors, or by one to be written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from exlq.errors import VerifyError
from exlq.formats.codec import Codec
from exlq.numerics.coupling import Coupling
from exlq.numerics.hessian import Factor, energies
from exlq.numerics.rounding import Rounded, sweep
from exlq.numerics.threads import in_parallel
from exlq.pipeline.parts import option_batches, parts
from exlq.types import LinearSpec, Option

SAMPLED_ROWS = 1024  # output rows of a trial
HELDOUT_ROWS = 128  # of those, on which the held-out error is taken, and to which descents are made
TINY = 1e-300


@dataclass(frozen=True)
class Evidence:
    """What is known of a linear's input, in the factor's processing order."""

    factor: Factor
    heldout: Tensor  # (in, in) float32, mean of x xᵀ over held-out tokens
    feedback: bool = True  # whether rounding hands errors on


@dataclass(frozen=True)
class Trial:
    """What an option does to a linear; energies are summed over output rows, per token.

    `loss` weights the rows' energies with half their Fisher information: nats per token.
    """

    err: float
    err_se: float
    err_heldout: float
    loss: float


@dataclass(frozen=True)
class Trials:
    """One trial per option; `sensitivity` is the loss at err = 1, were every row as wrong as the next."""

    options: tuple[Trial, ...]
    sensitivity: float


@dataclass(frozen=True)
class RowSample:
    """Output rows of a trial: the matrix cut into runs of rows alike in size, one row drawn of each."""

    rows: Tensor  # (n,) int64
    weights: Tensor  # (n,) float32, how many rows of the matrix each stands for

    @classmethod
    def draw(cls, size: Tensor, n: int, generator: torch.Generator) -> RowSample:
        """`size`, (out,), is what rows are sorted by; all rows are taken where there are at most `n`."""
        out = len(size)
        if out <= n:
            return cls(torch.arange(out), torch.ones(out))
        order = torch.argsort(size.cpu(), stable=True)
        edges = torch.linspace(0, out, n + 1).round().long()
        widths = edges.diff()
        drawn = (torch.rand(n, generator=generator) * widths).long().clamp_max(widths - 1)
        return cls(order[edges[:-1] + drawn], widths.float())


def try_options(
    codec: Codec[Any],
    spec: LinearSpec,
    options: Sequence[Option],
    weight: Tensor,
    evidence: Evidence,
    fisher: Tensor,
    generator: torch.Generator,
) -> Trials:
    """Errors of every option of one linear, each really rounded.

    Args:
        weight: (out_features, in_features) float32, in the model's channel order.
        fisher: (out_features,) float32 on the CPU, mean squared gradient of each output.
        generator: draws the sample of rows, where there are more than 1024.
    """
    whole = evidence.factor.energies(weight.T[evidence.factor.perm]).cpu()
    sample = RowSample.draw(whole * fisher, SAMPLED_ROWS, generator)
    picked = weight[sample.rows.to(weight.device)]
    every = max(1, len(picked) // HELDOUT_ROWS)

    def tried(batch: Sequence[Option]) -> tuple[Tensor, Tensor, Tensor]:
        return _energies(codec, spec, batch, picked, evidence, every)

    batches = list(option_batches(options, weight.shape[1], weight.device))
    own, descended, held = (
        torch.cat(parts).cpu() for parts in zip(*in_parallel(tried, batches, weight.device), strict=True)
    )
    unrounded = energies(picked[::every].T[evidence.factor.perm], evidence.heldout).cpu()
    own = _all_descended(own, descended, sample, every)
    return _trials(own, held, unrounded, sample, every, whole, fisher)


def _all_descended(own: Tensor, descended: Tensor, sample: RowSample, every: int) -> Tensor:
    """(options, rows) eᵀHe as descents would leave them, from those of the sweep and of every n-th row."""
    weights = sample.weights[::every].double()
    swept = (own[:, ::every].double() * weights).sum(1)
    gain = (descended.double() * weights).sum(1) / swept.clamp_min(TINY)
    own = own * gain.float().unsqueeze(1)
    own[:, ::every] = descended
    return own


def quantize(
    codec: Codec[Any],
    spec: LinearSpec,
    option: Option,
    weight: Tensor,
    factor: Factor,
    coupling: Coupling | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """One linear rounded for good: its stored tensors, and the (out, in) float32 weight they give back.

    Args:
        weight: (out_features, in_features) of any float dtype.
        coupling: of its output rows, where errors are to be handed on between them.

    Raises:
        VerifyError: if the stored tensors do not give back what the sweep left.
    """
    perm, device = factor.perm, factor.pivots.device
    levels: Tensor | None = None
    restored = torch.empty(weight.shape, device=device)
    grids = []
    swept = _uncoupled if coupling is None else coupled_sweeps(coupling)
    for rows, grid, rounded in swept(codec, spec, option, weight, factor):
        values = rounded.values[:, 0]
        found = codec.levels(spec, option, grid, values)
        levels = found.new_empty(spec.in_features, spec.out_features) if levels is None else levels
        levels[:, rows] = found
        restored[rows.unsqueeze(-1), perm] = values.T
        grids.append((rows, grid))
    assert levels is not None
    tensors = codec.pack(spec, option, levels, grids, perm)
    if not torch.equal(codec.unpack(tensors, spec, option), restored.cpu()):
        raise VerifyError(f"{spec.key}: the packed tensors do not give back the rounded weights")
    return tensors, restored


class Swept(NamedTuple):
    """Some output rows of a matrix after the sweep."""

    rows: Tensor  # (n,) int64
    weight: Tensor  # (in_features, n) float32 in processing order, as it was before
    grid: Any
    rounded: Rounded

    def of_rows(self, chosen: Tensor) -> Swept:
        """Some of them, by their places (k,) int64."""
        parts = (part.index_select(-1, chosen) for part in self.rounded)
        picked = self.weight.index_select(-1, chosen)
        return Swept(self.rows[chosen], picked, self.grid.of_rows(chosen), Rounded(*parts))


def sweeps(
    codec: Codec[Any], spec: LinearSpec, options: Sequence[Option], weight: Tensor, factor: Factor
) -> Iterator[Swept]:
    """Sweeps of `weight`, (out, in) in the model's channel order, over parts of its output rows."""
    leader = None
    for rows in parts(weight, factor.perm, len(options)):
        rows = rows.to(factor.perm.device)
        turned = weight[rows.to(weight.device)].to(factor.pivots).T.contiguous()[factor.perm]
        grid = codec.grid(spec, options, factor, turned, leader)
        rounded = sweep(turned, factor, grid, len(options))
        leader = leader or grid
        yield Swept(rows, turned, grid, rounded)


def _uncoupled(
    codec: Codec[Any], spec: LinearSpec, option: Option, weight: Tensor, factor: Factor
) -> Iterator[tuple[Tensor, Any, Rounded]]:
    """`sweeps` of one option, each followed by descents."""
    for swept in sweeps(codec, spec, [option], weight, factor):
        yield swept.rows, *codec.refined(spec, [option], swept.grid, factor, swept.weight, swept.rounded)


def coupled_sweeps(coupling: Coupling) -> Callable[..., Iterator[tuple[Tensor, Any, Rounded]]]:
    """Like `_uncoupled`, each sweep over rows that have taken over the errors of those before."""

    def swept(
        codec: Codec[Any], spec: LinearSpec, option: Option, weight: Tensor, factor: Factor
    ) -> Iterator[tuple[Tensor, Any, Rounded]]:
        device, options = factor.pivots.device, [option]
        weight = weight.to(factor.pivots)
        errors = torch.zeros_like(weight)
        leader = _leader(codec, spec, options, weight, factor) if codec.shares_scales else None
        for step in coupling.steps():
            rows = step.rows.to(device)
            moved = weight[rows] + step.handed_on(errors)
            turned = moved.T.contiguous()[factor.perm]
            grid = codec.grid(spec, options, factor, turned, leader)
            rounded = sweep(turned, factor, grid, len(options))
            grid, rounded = codec.refined(spec, options, grid, factor, turned, rounded)
            errors[rows] = weight[rows] - rounded.values[factor.perm.argsort(), 0].T
            yield rows, grid, rounded

    return swept


def _leader(
    codec: Codec[Any], spec: LinearSpec, options: Sequence[Option], weight: Tensor, factor: Factor
) -> Any:
    """The grid of a sweep over as many rows as go at once, for what belongs to all rows."""
    rows = parts(weight, factor.perm, len(options))[0].to(weight.device)
    turned = weight[rows].T.contiguous()[factor.perm]
    grid = codec.grid(spec, options, factor, turned, None)
    sweep(turned, factor, grid, len(options))
    return grid


def _energies(
    codec: Codec[Any],
    spec: LinearSpec,
    options: Sequence[Option],
    weight: Tensor,
    evidence: Evidence,
    every: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """eᵀHe of each option and row of `weight`, after the sweep.

    Returns:
        (options, rows) on calibration; of every n-th row, after descents, on calibration and held out.
    """
    factor = evidence.factor
    own, descended, heldout = torch.empty(3, len(options), len(weight), device=weight.device)
    used = factor if evidence.feedback else factor.without_feedback()

    def energy(rounded: Rounded) -> Tensor:
        if not evidence.feedback:
            return factor.energies(rounded.errors)
        return (rounded.energy - factor.ridge * rounded.errors.square().sum(0)).clamp_min(0)

    for swept in sweeps(codec, spec, options, weight, used):
        own[:, swept.rows] = energy(swept.rounded)
        part = swept.of_rows((swept.rows % every == 0).nonzero()[:, 0])
        _, rounded = codec.refined(spec, options, part.grid, used, part.weight, part.rounded)
        descended[:, part.rows] = energy(rounded)
        heldout[:, part.rows] = energies(rounded.errors, evidence.heldout)
    return own, descended[:, ::every], heldout[:, ::every]


def _trials(
    own: Tensor,
    held: Tensor,
    unrounded: Tensor,
    sample: RowSample,
    every: int,
    whole: Tensor,
    fisher: Tensor,
) -> Trials:
    """Sums over rows.

    Args:
        own: (options, rows) eᵀHe of the sampled rows; `held`, (options, fewer), of every n-th of them
            under the held-out Hessian, and `unrounded`, (fewer,), wᵀHw of these under the same.
        whole: (out,) wᵀHw of all rows; `fisher` likewise.
    """
    total = float(whole.double().sum())
    scale = 1 / total if total > 0 else 0.0
    weighted = own.double() * sample.weights
    rest = sample.weights[::every].double()
    ratio = (held.double() * rest).sum(1) / weighted[:, ::every].sum(1).clamp_min(TINY)
    base = whole[sample.rows[::every]].double()
    base_ratio = (unrounded.double() * rest).sum() / (base * rest).sum().clamp_min(TINY)
    err = weighted.sum(1) * scale
    err_heldout = err * ratio / base_ratio.clamp_min(TINY)
    loss = (weighted * fisher[sample.rows].double() / 2).sum(1) * ratio
    sampled = len(sample.rows) < len(fisher)
    deviation = _standard_error(weighted) * scale if sampled else torch.zeros_like(err)
    figures = zip(err.tolist(), deviation.tolist(), err_heldout.tolist(), loss.tolist(), strict=True)
    sensitivity = float((whole.double() * fisher).sum()) / 2
    return Trials(tuple(Trial(*row) for row in figures), sensitivity)


def _standard_error(weighted: Tensor) -> Tensor:
    """Of a stratified sum with one draw a stratum: from the differences of neighbouring strata."""
    return (weighted.diff(dim=1).square().sum(1) / 2).sqrt()
