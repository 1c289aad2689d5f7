"""Weighted searches for scales, on the values a file can hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from exlq.numerics.kernels import COMPILED, for_triton

N_PROBES = 7  # scales tried per row before the multiplier is known
N_MULTIPLIERS = 8
PROBE_TOP = 1.15  # of the scale that just holds the largest weight
PROBE_BOTTOM = {2: 0.35, 3: 0.5, 4: 0.6, 5: 0.7, 6: 0.8, 8: 0.9}  # clipping pays more, the fewer the bits
SMALLEST = 2.0**-24  # the smallest positive float16


def fit_squared_scales(
    weights: Tensor, importance: Tensor, bits: Sequence[int], multiplier: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scales of the form k² · m, k in 1..16 per row and m a float16 per group, least in weighted error.

    Every row's error is probed at seven scales and a parabola laid through the best three; m is the
    candidate that leaves all rows together the least of it; k is then chosen among the neighbours of
    the best by the exact error of the stored values.

    Args:
        weights: (size, groups, out) float32.
        importance: (size,) weight of each input channel's squared error.
        bits: of each group; levels go from -2^(bits-1) to 2^(bits-1) - 1.
        multiplier: (groups,) float16 to take instead of searching.

    Returns:
        m (groups,) float16, never zero; k - 1 (groups, out) uint8.

    Source: the scales of EXL2, see `exlq.formats.exl2`; why they are weighted: `docs/design.md`.
    """
    half, bottom = _ends(tuple(bits), weights.device)
    if for_triton(weights):
        return _on_gpu(weights, importance, half, bottom, multiplier)
    base = weights.abs().amax(0).clamp_min(1e-12) / (half - 0.5)
    curve = _ErrorCurve.probe(weights, importance, half, base, bottom)
    best = curve.minimum()
    if multiplier is None:
        multiplier = _best_multiplier(curve, best)
    nearest = (best / multiplier.float().unsqueeze(-1)).sqrt().round()
    root = _best_neighbour(weights, importance, half, multiplier, nearest)
    return multiplier, (root - 1).to(torch.uint8)


@lru_cache(maxsize=1024)
def _ends(bits: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """(groups, 1) each: minus the lowest levels, and the logarithms of the first probes."""
    half = torch.tensor([[2.0 ** (b - 1)] for b in bits], device=device)
    return half, torch.tensor([[PROBE_BOTTOM[b]] for b in bits], device=device).log()


def _on_gpu(
    weights: Tensor, importance: Tensor, half: Tensor, bottom: Tensor, multiplier: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The search of `fit_squared_scales` in Triton's kernels."""
    from exlq.numerics.triton_scales import best_codes, best_multiplier, probe

    weights, importance, top = weights.contiguous(), importance.contiguous(), math.log(PROBE_TOP)
    errors, base, best = probe(weights, importance, half, bottom, top)
    if multiplier is None:
        spread = _spread(weights.device)
        multiplier = best_multiplier(errors, base, best, bottom, spread, top, SMALLEST)
    return multiplier, best_codes(weights, importance, half, multiplier, best)


@lru_cache(maxsize=16)
def _spread(device: torch.device) -> Tensor:
    """(candidates,), what the multiplier first thought of is multiplied with."""
    return torch.linspace(0.85, 1.2, N_MULTIPLIERS, device=device)


class _ErrorCurve:
    """Weighted error of each row at scales base · exp(bottom + i · step); the last two per group."""

    def __init__(self, base: Tensor, errors: Tensor, bottom: Tensor, step: Tensor) -> None:
        self.base, self.errors, self.bottom, self.step = base, errors, bottom, step

    @classmethod
    def probe(
        cls, weights: Tensor, importance: Tensor, half: Tensor, base: Tensor, bottom: Tensor
    ) -> _ErrorCurve:
        step = (math.log(PROBE_TOP) - bottom) / (N_PROBES - 1)
        steps = torch.arange(N_PROBES, device=base.device).view(-1, 1, 1)
        scales = base * (bottom + steps * step).exp()
        return cls(base, errors_at(scales, weights, importance, half), bottom, step)

    def minimum(self) -> Tensor:
        """(groups, out) the scale at the lowest point of the parabola through the best three probes."""
        i = _first_minimum(self.errors).clamp(1, N_PROBES - 2)
        left, middle, right = (self.errors.gather(0, i + d)[0] for d in (-1, 0, 1))
        bend = (left - 2 * middle + right).clamp_min(1e-30)
        offset = ((left - right) / (2 * bend)).clamp(-1, 1)
        return self.base * (self.bottom + self.step * (i[0] + offset)).exp()

    def at(self, scale: Tensor) -> Tensor:
        """Error at other scales (..., groups, out), interpolated; grown linearly beyond the ends."""
        position = ((scale / self.base).log() - self.bottom) / self.step
        inside = position.clamp(0, N_PROBES - 1)
        i = inside.long().clamp_max(N_PROBES - 2)
        low, high = self.errors.expand(scale.shape[0], *self.errors.shape), i.unsqueeze(1)
        between = torch.lerp(low.gather(1, high)[:, 0], low.gather(1, high + 1)[:, 0], inside - i)
        return between * (1 + 4 * self.step * (position - inside).abs())


def _best_multiplier(curve: _ErrorCurve, best: Tensor) -> Tensor:
    """(groups,) float16: the largest code on about the largest best scale, moved for the good of all rows."""
    top = best.amax(-1) / 256
    spread = _spread(best.device).unsqueeze(-1)
    candidates = (top * spread).clamp(SMALLEST, 255.0).half()  # (candidates, groups)
    step = candidates.float().unsqueeze(-1)
    root = (best / step).sqrt()
    below, above = root.floor().clamp(1, 16), root.ceil().clamp(1, 16)
    errors = torch.minimum(curve.at(below.square() * step), curve.at(above.square() * step)).sum(-1)
    return candidates.gather(0, _first_minimum(errors))[0]


def _best_neighbour(
    weights: Tensor, importance: Tensor, half: Tensor, multiplier: Tensor, nearest: Tensor
) -> Tensor:
    """(groups, out) k among `nearest` and its two neighbours by the exact error of the stored values."""
    roots = torch.stack([(nearest + delta).clamp(1, 16) for delta in (0, -1, 1)])
    scales = (roots.square().half() * multiplier.unsqueeze(-1)).float()
    errors = errors_at(scales, weights, importance, half)
    return roots.gather(0, _first_minimum(errors))[0]


def errors_at(scales: Tensor, weights: Tensor, importance: Tensor, half: Tensor) -> Tensor:
    """Weighted squared errors of plain rounding at several scales.

    Args:
        scales: (probes, groups, out) float32.
        weights: (size, groups, out) float32; `importance` (size,).
        half: (groups, 1), minus the lowest level of each group.

    Returns:
        (probes, groups, out) float32.
    """
    if weights.device.type == "cpu" and COMPILED:
        from exlq.numerics.compiled import rounding_errors

        errors = torch.empty(scales.shape)
        arrays = [x.contiguous().numpy() for x in (weights, scales, importance, half.squeeze(-1))]
        rounding_errors(*arrays, errors.numpy())
        return errors
    errors = torch.empty_like(scales)
    for probe, scale in enumerate(scales):
        levels = torch.minimum(torch.maximum((weights / scale).round_(), -half), half - 1)
        errors[probe] = torch.einsum("sgo,s->go", levels.mul_(scale).sub_(weights).square_(), importance)
    return errors


def _first_minimum(errors: Tensor) -> Tensor:
    """(1, …) int64 index of the least along the first dimension."""
    if errors.device.type == "cpu" and COMPILED:  # torch's kernel is slow along the first dimension
        from exlq.numerics.compiled import first_minimum

        found = torch.empty(1, *errors.shape[1:], dtype=torch.int64)
        first_minimum(errors.flatten(1).contiguous().numpy(), found.view(-1).numpy())
        return found
    return errors.argmin(0, keepdim=True)
