"""One linear rounded: by many options to learn their errors, or by one to be written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from exlq.errors import VerifyError
from exlq.formats.codec import Codec
from exlq.numerics.coupling import Coupling
from exlq.numerics.hessian import Factor, energies
from exlq.numerics.rounding import Rounded, sweep
from exlq.numerics.threads import in_parallel
from exlq.types import LinearSpec, Option

SWEEP_BYTES = 192 << 20  # working arrays of one sweep
FEWEST_ROWS = 2048  # fewer in one sweep and the multipliers of its groups rest on too little
SAMPLED_ROWS = 1024  # output rows of a trial
HELDOUT_ROWS = 256  # of those, on which the held-out error is taken
ROWS_LOOKED_AT = 1024  # at once, for their largest weights
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

    def tried(batch: Sequence[Option]) -> tuple[Tensor, Tensor]:
        return _energies(codec, spec, batch, picked, evidence, every)

    batches = list(option_batches(options, weight.shape[1]))
    own, held = zip(*in_parallel(tried, batches, weight.device), strict=True)
    unrounded = energies(picked[::every].T[evidence.factor.perm], evidence.heldout).cpu()
    return _trials(torch.cat(own).cpu(), torch.cat(held).cpu(), unrounded, sample, every, whole, fisher)


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
    swept = sweeps if coupling is None else coupled_sweeps(coupling)
    for rows, grid, rounded in swept(codec, spec, [option], weight, factor):
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


def sweeps(
    codec: Codec[Any], spec: LinearSpec, options: Sequence[Option], weight: Tensor, factor: Factor
) -> Iterator[tuple[Tensor, Any, Rounded]]:
    """Sweeps of `weight`, (out, in) in the model's channel order, over parts of its output rows."""
    leader = None
    for rows in parts(weight, factor.perm, len(options)):
        rows = rows.to(factor.perm.device)
        turned = weight[rows.to(weight.device)].to(factor.pivots).T.contiguous()[factor.perm]
        grid = codec.grid(spec, options, factor, turned, leader)
        rounded = sweep(turned, factor, grid, len(options))
        leader = leader or grid
        yield rows, *codec.refined(spec, options, grid, factor, turned, rounded)


def coupled_sweeps(coupling: Coupling) -> Callable[..., Iterator[tuple[Tensor, Any, Rounded]]]:
    """`sweeps` of one option, each over rows that have taken over the errors of those before."""

    def swept(
        codec: Codec[Any], spec: LinearSpec, options: Sequence[Option], weight: Tensor, factor: Factor
    ) -> Iterator[tuple[Tensor, Any, Rounded]]:
        device = factor.pivots.device
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


def parts(weight: Tensor, perm: Tensor, n_options: int) -> list[Tensor]:
    """Output rows (n,) int64 of each sweep of `weight`, (out, in); every part has rows from all over it.

    The first, whose multipliers the others take over, also has the rows with the largest weights: one
    for every run of channels of the processing order `perm`. Without them the others would be clipped.
    """
    out, in_features = weight.shape
    n_parts = -(-out // max(32, _rows_at_once(in_features, n_options)))
    if n_parts == 1:
        return [torch.arange(out)]
    size = -(-out // n_parts)
    first = _reaching_rows(weight, perm, size // 2)
    others = _without(torch.arange(out), first)
    fill = others[torch.linspace(0, len(others) - 1, size - len(first)).long()]
    others = _without(others, fill)
    return [torch.cat([first, fill]), *(others[part :: n_parts - 1] for part in range(n_parts - 1))]


def _reaching_rows(weight: Tensor, perm: Tensor, most: int) -> Tensor:
    """The row with the largest weight in every run of 32 channels of `perm`, or more: at most `most` rows."""
    run = 32 * max(1, -(-len(perm) // (32 * most)))
    order = torch.nn.functional.pad(perm.cpu(), (0, -len(perm) % run), value=int(perm[-1]))
    reach = [
        rows.cpu()[:, order].abs().view(len(rows), -1, run).amax(2)  # (rows, runs)
        for rows in torch.split(weight, ROWS_LOOKED_AT)
    ]
    return torch.tensor(sorted(set(torch.cat(reach).argmax(0).tolist())))


def _without(rows: Tensor, dropped: Tensor) -> Tensor:
    return rows[~torch.isin(rows, dropped)]


def _rows_at_once(in_features: int, n_options: int) -> int:
    return SWEEP_BYTES // (in_features * n_options * 8)


def option_batches(options: Sequence[Option], in_features: int) -> Iterator[Sequence[Option]]:
    """Runs of options that are swept together."""
    at_once = max(1, min(len(options), _rows_at_once(in_features, 1) // FEWEST_ROWS))
    for start in range(0, len(options), at_once):
        yield options[start : start + at_once]


def _energies(
    codec: Codec[Any],
    spec: LinearSpec,
    options: Sequence[Option],
    weight: Tensor,
    evidence: Evidence,
    every: int,
) -> tuple[Tensor, Tensor]:
    """eᵀHe of each option and row of `weight`: (options, rows) on calibration, every n-th row held out."""
    factor = evidence.factor
    own = torch.empty(len(options), len(weight), device=weight.device)
    heldout = torch.empty_like(own)
    used = factor if evidence.feedback else factor.without_feedback()
    for rows, _, rounded in sweeps(codec, spec, options, weight, used):
        undamped = rounded.energy - factor.ridge * rounded.errors.square().sum(0)
        own[:, rows] = undamped.clamp_min(0) if evidence.feedback else factor.energies(rounded.errors)
        chosen = (rows % every == 0).nonzero()[:, 0]
        heldout[:, rows[chosen]] = energies(rounded.errors[:, :, chosen], evidence.heldout)
    return own, heldout[:, ::every]


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
