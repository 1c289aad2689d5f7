"""The second pass: every linear rounded for good, on inputs from the already quantized model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from exlq import memory
from exlq.errors import HessianError
from exlq.formats.codec import Codec
from exlq.models.block import Block
from exlq.models.model import Model
from exlq.models.staged import StagedPass
from exlq.numerics import hessian
from exlq.numerics.drift import DriftSum
from exlq.numerics.hessian import Factor, HessianSum
from exlq.pipeline import passes, trial
from exlq.pipeline.config import ConvertConfig
from exlq.pipeline.plan import Plan
from exlq.pipeline.progress import Progress
from exlq.pipeline.sensitivity import Sensitivity
from exlq.types import LinearSpec, Option
from exlq.workspace import Workspace

Stored = tuple[LinearSpec, dict[str, Tensor]]

JUDGED_TOKENS = 4096  # of the calibration, that learn how far corrections hold


@dataclass(frozen=True)
class Rounding:
    """How the linears of one model are rounded for good."""

    plan: Plan
    codec: Codec[Any]
    options: Mapping[str, Option]
    sensitivity: Sensitivity | None = None  # None: errors are not handed on between rows

    @property
    def follows_base(self) -> bool:
        """Whether the base model runs beside the quantized one."""
        methods = self.plan.config.methods
        return self.plan.config.gptq and (methods.input_correction or methods.residual_correction)

    def rounded(self, spec: LinearSpec, factor: Factor, drift: DriftSum | None) -> tuple[Stored, Tensor]:
        """One linear's stored tensors, and the (out, in) float32 weight that they give back."""
        weight = self.plan.model.linear_weight(spec.key).to(factor.pivots)
        if drift is not None:
            weight = drift.corrected(weight, factor)
        coupling = None if self.sensitivity is None else self.sensitivity.coupling(spec.key, weight.device)
        option = self.options[spec.key]
        tensors, restored = trial.quantize(self.codec, spec, option, weight, factor, coupling)
        return (spec, tensors), restored


def quantized_linears(
    rounding: Rounding, workspace: Workspace, progress: Progress, embedding: Tensor | None = None
) -> Iterator[Stored]:
    """Every linear's stored tensors, block by block in true sequence, then lm_head's, where it has an option.

    What a block hands on comes from its quantized linears; inside a block, each stage's Hessian
    is taken with the stages before it quantized. The base model runs beside, on the same rows, so that
    each linear can make up for what the ones before have changed. Held-out rows take no part.
    `embedding`, (vocab, hidden_size), is the quantized one.
    """
    model = rounding.plan.model
    streams = Streams.begun(rounding, workspace, embedding)
    stage, steps = f"quantizing {rounding.codec.name}", model.n_blocks + 1
    for index in range(model.n_blocks):
        with model.block(index) as block:
            yield from _block(rounding, block, index, streams, workspace)
        progress(stage, index + 1, steps)
    if model.head.key in rounding.options:
        yield _head(rounding, streams)
    streams.remove(workspace)
    progress(stage, steps, steps)


@dataclass(frozen=True)
class Streams:
    """Hidden states after the quantized prefix, and in the base model, where that is followed."""

    quantized: Tensor  # (n_rows, length, hidden_size)
    base: Tensor | None
    base_model: Model | None

    @classmethod
    def begun(cls, rounding: Rounding, workspace: Workspace, embedding: Tensor | None) -> Streams:
        plan = rounding.plan
        ids, dtype = plan.quantized_on, passes.STATE_DTYPES[plan.config.states]
        quantized = passes.embedded(plan.model, ids, workspace, dtype, embedding)
        if not rounding.follows_base:
            return cls(quantized, None, None)
        base = passes.embedded(plan.model, ids, workspace, dtype, name="base-states")
        return cls(quantized, base, plan.model.twin())

    def remove(self, workspace: Workspace) -> None:
        workspace.remove("states")
        workspace.remove("base-states")

    def judges(self, rows: slice) -> bool:
        """Whether these rows judge corrections: every n-th batch, about 4096 tokens in all."""
        n_rows, length = self.quantized.shape[:2]
        at_once = passes.rows_at_once(length)
        every = max(2, n_rows * length // JUDGED_TOKENS)
        return bool(rows.start // at_once % every == every - 1)


def _block(
    rounding: Rounding, block: Block, index: int, streams: Streams, workspace: Workspace
) -> Iterator[Stored]:
    rows_at_once = passes.rows_at_once(streams.quantized.shape[1])
    quantized = Pass(block.staged(workspace.tensor, rows_at_once), streams.quantized)
    if streams.base_model is None:
        yield from _stages(rounding, block, index, streams, quantized, None)
        return
    assert streams.base is not None
    with streams.base_model.block(index) as twin:
        staged = twin.staged(lambda name, shape: workspace.tensor(f"base-{name}", shape), rows_at_once)
        base = Pass(staged, streams.base)
        yield from _stages(rounding, block, index, streams, quantized, base)


class Pass(NamedTuple):
    """One model's way through a block."""

    staged: StagedPass
    states: Tensor


def _stages(
    rounding: Rounding, block: Block, index: int, streams: Streams, quantized: Pass, base: Pass | None
) -> Iterator[Stored]:
    plan = rounding.plan
    for stage, linears in passes.linears_by_stage(plan.model, index).items():
        memory.release()
        total, drift = _moments(rounding, stage, linears[0].spec.in_features, streams, quantized, base)
        act_order = all(rounding.codec.sorts_channels(linear.spec) for linear in linears)
        factor = factored(plan.config, total, f"block {index}, {stage}", act_order)
        memory.release()
        for linear in linears:
            stored, restored = rounding.rounded(linear.spec, factor, drift)
            block.set_weight(linear.spec.key, restored)
            yield stored
    for each in (quantized, base):
        if each is not None:
            each.staged.outputs(each.states, each.states)


def _moments(
    rounding: Rounding, stage: str, in_features: int, streams: Streams, quantized: Pass, base: Pass | None
) -> tuple[HessianSum, DriftSum | None]:
    """The Hessian of a stage's inputs, and how these have drifted from the base model's."""
    model, methods = rounding.plan.model, rounding.plan.config.methods
    total = HessianSum.zeros(in_features, model.device)
    if base is None:
        for _, x in quantized.staged.inputs(stage, quantized.states):
            total.add(x)
        return total, None
    closes = quantized.staged.closes(stage) and not model.family.norms_outputs
    follows_stream = closes and methods.residual_correction
    drift = DriftSum(in_features, model.hidden_size if follows_stream else None, model.device)
    both = (each.staged.inputs(stage, each.states) for each in (quantized, base))
    for (rows, x), (_, wanted) in zip(*both, strict=True):
        total.add(x)
        stream = None
        if follows_stream:
            stream = base.staged.residual(base.states, rows) - quantized.staged.residual(
                quantized.states, rows
            )
        drift.add(wanted if methods.input_correction else x, x, stream, streams.judges(rows))
    return total, drift


def _head(rounding: Rounding, streams: Streams) -> Stored:
    plan, model = rounding.plan, rounding.plan.model
    total = HessianSum.zeros(model.hidden_size, model.device)
    drift = DriftSum(model.hidden_size, None, model.device)
    follows = streams.base is not None and plan.config.methods.input_correction
    for rows in passes.batches(streams.quantized):
        x = model.final_norm(streams.quantized[rows].float())
        total.add(x)
        if follows:
            assert streams.base is not None
            drift.add(model.final_norm(streams.base[rows].float()), x, None, streams.judges(rows))
    factor = factored(plan.config, total, model.head.key)
    return rounding.rounded(model.head, factor, drift if follows else None)[0]


def factored(config: ConvertConfig, total: HessianSum, what: str, act_order: bool = True) -> Factor:
    """The factor that is rounded by; `what` names the input in an error."""
    try:
        factor = hessian.factor(total.mean(), act_order=act_order)
        factor = factor if config.descends else factor._replace(hessian=None)
        return factor if config.gptq else factor.without_feedback()
    except HessianError as exc:
        raise HessianError(f"{what}: {exc}") from exc
