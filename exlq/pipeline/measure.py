"""The measuring pass: every option of every linear tried on the unquantized model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from exlq import memory
from exlq.formats.codec import Codec
from exlq.measurement import LinearRecord, Measurement, OptionRecord
from exlq.models.layout import Linear
from exlq.numerics import hessian
from exlq.pipeline import passes, trial
from exlq.pipeline.embedding import embedding_cost
from exlq.pipeline.passes import BlockHessians, InputHessians
from exlq.pipeline.plan import Plan
from exlq.pipeline.progress import Progress
from exlq.pipeline.sensitivity import Sensitivity
from exlq.pipeline.states import HiddenStates
from exlq.pipeline.tensor_cache import hashed
from exlq.types import LinearSpec, Option
from exlq.workspace import Workspace


def measure(
    plan: Plan,
    sensitivity: Sensitivity,
    begun: Measurement,
    workspace: Workspace,
    save: Callable[[Measurement], None],
    progress: Progress,
) -> Measurement:
    """Runs the model block by block and tries all options of each block's linears.

    Args:
        begun: an earlier record of the same origin; its linears are not measured again.
        save: called with the record after every block.
    """
    model, rows = plan.model, plan.measurement_rows
    record, known = begun, {linear.key for linear in begun.linears}
    steps = model.n_blocks + 1
    measured = [all(linear.spec.key in known for linear in model.linears(i)) for i in range(model.n_blocks)]
    marks = [hashed(plan.origin, index) for index in range(steps)]
    shape, dtype = (*rows.ids.shape, model.hidden_size), passes.STATE_DTYPES[plan.config.states]
    states = HiddenStates(workspace, ("states",), shape, dtype)
    begin = states.resume(marks[: [*measured, False].index(False) + 1])
    if begin is None:
        states.begin()
        passes.embedded(model, rows.ids, workspace, dtype)
    for index in range(begin or 0, model.n_blocks):
        hessians = _forward(plan, index, states.before("states"), states.after("states"), not measured[index])
        for stage, linears in passes.linears_by_stage(model, index).items():
            wanted = [linear for linear in linears if linear.spec.key not in known]
            if not wanted:
                continue
            evidence = _Evidence(plan, hessians.by_stage.pop(stage), f"block {index}, {stage}", linears)
            memory.release()
            for linear in wanted:
                tried = _record(plan, linear.spec, evidence.of, _costs(plan, sensitivity, linear.spec.key))
                record = record.with_linear(replace(tried, tie=linear.tie))
        save(record)
        states.turn(marks[index + 1])
        progress("measuring", index + 1, steps)
    record = _with_ends(plan, record, states.before("states"), sensitivity)
    save(record)
    states.begin()
    progress("measuring", steps, steps)
    return record


def _costs(plan: Plan, sensitivity: Sensitivity, key: str) -> Tensor:
    """(out_features,) what a mean squared error of each output of a linear costs, twice."""
    coupling = sensitivity.coupling(key, plan.model.device) if plan.config.couples_rows else None
    return sensitivity.outputs[key] if coupling is None else coupling.costs


def _forward(plan: Plan, index: int, states: Tensor, after: Tensor, gather: bool) -> BlockHessians:
    """Runs a block on all rows of `states` into `after`; Hessians of its inputs, where wanted."""
    model, taken = plan.model, plan.measurement_rows
    hessians = BlockHessians(model.device)
    with model.block(index) as block:
        for rows in passes.batches(taken.ids):
            look = passes.looking(f"block {index}", rows.start, taken.row_name)
            listener = hessians.listener(taken.heldout[rows], look) if gather else None
            out = block.forward(states[rows].float(), listener)
            after[rows] = out.to("cpu", after.dtype)
    return hessians


class _Evidence:
    """One input's Hessians, factored once for all codecs that may process its channels in any order."""

    def __init__(
        self, plan: Plan, hessians: InputHessians, what: str, linears: Sequence[Linear] = ()
    ) -> None:
        self._plan, self._linears = plan, linears
        self._calibration, self._heldout = hessians.means(what)
        self._made: dict[bool, trial.Evidence] = {}

    def of(self, codec: Codec[Any]) -> trial.Evidence:
        act_order = all(codec.sorts_channels(linear.spec) for linear in self._linears)
        if act_order not in self._made:
            factor = hessian.factor(self._calibration, act_order=act_order)
            factor = factor if self._plan.config.descends else factor._replace(hessian=None)
            heldout = self._heldout[factor.perm][:, factor.perm]
            self._made[act_order] = trial.Evidence(factor, heldout, self._plan.config.gptq)
        return self._made[act_order]


def _record(
    plan: Plan, spec: LinearSpec, evidence: Callable[[Codec[Any]], trial.Evidence], rows: Tensor
) -> LinearRecord:
    """All options of one matrix; `rows`, (out_features,), is what an error of each output costs."""
    weight = plan.model.linear_weight(spec.key).to(plan.model.device, torch.float32, copy=True)
    records: list[OptionRecord] = []
    sensitivity: float | None = None
    for codec, options in plan.tried(spec):
        generator = torch.Generator().manual_seed(plan.config.seed)
        found = trial.try_options(codec, spec, options, weight, evidence(codec), rows, generator)
        pairs: Iterable[tuple[Option, trial.Trial]] = zip(options, found.options, strict=True)
        if plan.config.objective == "output-error":
            pairs = ((option, replace(result, loss=result.err_heldout)) for option, result in pairs)
        else:
            sensitivity = found.sensitivity
        records += [_option_record(codec, spec, option, result) for option, result in pairs]
    sampled = trial.SAMPLED_ROWS if spec.out_features > trial.SAMPLED_ROWS else None
    return LinearRecord(spec.key, spec.numel, tuple(records), sensitivity, sampled_rows=sampled)


def _option_record(codec: Codec[Any], spec: LinearSpec, option: Option, result: trial.Trial) -> OptionRecord:
    bits = codec.storage_bits(spec, option)
    return OptionRecord(
        desc=option.desc,
        bpw=bits / spec.numel,
        total_bits=bits,
        err=result.err,
        qparams=option.qparams,
        err_heldout=result.err_heldout,
        loss=result.loss,
        err_se=result.err_se,
    )


def _with_ends(plan: Plan, record: Measurement, states: Tensor, sensitivity: Sensitivity) -> Measurement:
    """The record with lm_head and the embedding."""
    model, rows = plan.model, plan.measurement_rows
    known = {linear.key for linear in record.linears}
    if model.head.key not in known and plan.tried(model.head):
        hessians = passes.head_hessians(model, states, rows.heldout, rows.ids, rows.row_name)
        evidence = _Evidence(plan, hessians, model.head.key)
        head = _record(plan, model.head, evidence.of, sensitivity.outputs[model.head.key])
        record = record.with_linear(head)
    if model.embedding_key not in known:
        record = record.with_linear(_embedding(plan, sensitivity))
    return record


def _embedding(plan: Plan, sensitivity: Sensitivity) -> LinearRecord:
    """The embedding, which EXL2 keeps in float16."""
    spec = plan.model.embedding
    kept = OptionRecord("f16", 16.0, 16 * spec.numel, 0.0, {"bits": [16]}, 0.0, 0.0, 0.0)
    if not plan.tried(spec):
        return LinearRecord(spec.key, spec.numel, (kept,))
    cost = embedding_cost(plan.model, sensitivity, plan.measurement_rows.ids)
    factor = hessian.factor(cost.hessian.to(plan.model.device))
    evidence = trial.Evidence(factor, cost.hessian[factor.perm.cpu()][:, factor.perm.cpu()], plan.config.gptq)
    tried = _record(plan, spec, lambda _: evidence, cost.rows)
    if not any(codec.name == "exl2" for codec in plan.codecs):
        return tried
    return replace(tried, options=(kept, *tried.options))
