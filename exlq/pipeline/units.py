"""The units of work: functions of their arguments alone, whoever does them (`exlq.pipeline.workers`).

A unit runs where its Hessian or factor lies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from exlq.errors import HessianError
from exlq.formats.codec import Codec
from exlq.numerics import hessian
from exlq.numerics.coupling import Coupling
from exlq.numerics.drift import DriftSum
from exlq.numerics.hessian import Factor, HessianSum
from exlq.pipeline import arithmetic, kinds, trial
from exlq.pipeline.config import ConvertConfig
from exlq.pipeline.profile import Profile
from exlq.pipeline.tensor_cache import Kept
from exlq.sizing import flops
from exlq.types import LinearSpec, Option


def evidence(
    calibration: Tensor, heldout: Tensor, act_order: bool, descends: bool, feedback: bool, profile: Profile
) -> trial.Evidence:
    """What options are tried by, from both Hessians of an input, (in, in) float32."""
    with profile.spent(kinds.FACTORS, flops.factor(len(calibration))):
        factor = hessian.factor(calibration, act_order=act_order)
    factor = factor if descends else factor._replace(curvature=None)
    return trial.Evidence(factor, heldout[factor.perm][:, factor.perm], feedback)


def tried(
    codec: Codec[Any],
    spec: LinearSpec,
    options: Sequence[Option],
    weight: Tensor,
    evidence: trial.Evidence,
    costs: Tensor,
    seed: int,
    profile: Profile,
) -> trial.Trials:
    """What every option of one matrix does to it.

    Args:
        weight: (out_features, in_features) as it is stored.
        costs: (out_features,) float32, what an error of each output costs, twice.
    """
    weight = weight.to(evidence.factor.pivots, copy=True)  # into aligned memory
    generator = torch.Generator().manual_seed(seed)
    given = profile.codec(codec), spec, options, weight, evidence, costs.cpu(), generator
    with profile.spent(kinds.TRIALS, arithmetic.trials(spec, len(options))):
        return trial.try_options(*given)


def factored(
    config: ConvertConfig, total: HessianSum, what: str, act_order: bool, profile: Profile
) -> Factor:
    """The factor that is rounded by; `what` names the input in an error. `total` is used up."""
    try:
        with profile.spent(kinds.FACTORS, flops.factor(len(total.total))):
            factor = hessian.factor(total.calibrated(), act_order=act_order)
        factor = factor if config.descends else factor._replace(curvature=None)
        return factor if config.gptq else factor.without_feedback()
    except HessianError as exc:
        raise HessianError(f"{what}: {exc}") from exc


def rounded(
    codec: Codec[Any],
    spec: LinearSpec,
    option: Option,
    weight: Tensor,
    factor: Factor,
    drift: DriftSum | None,
    coupling: Coupling | None,
    profile: Profile,
) -> tuple[Kept, Tensor]:
    """One linear rounded for good: what it is stored as, and the (out, in) float32 that this gives back.

    Args:
        weight: (out_features, in_features) as it is stored.
    """
    weight = weight.to(factor.pivots, copy=True)  # into aligned memory
    if drift is not None:
        with profile.spent(kinds.CORRECTIONS, arithmetic.correction(spec)):
            weight = drift.corrected(weight, factor)
    with profile.spent(kinds.SWEEPS, arithmetic.rounding(spec)):
        tensors, restored = trial.quantize(profile.codec(codec), spec, option, weight, factor, coupling)
    return Kept(tensors, factor.raised, factor.dead), restored
