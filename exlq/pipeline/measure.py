"""The measuring pass: every option of every linear tried on the unquantized model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from exlq import memory
from exlq.formats.codec import Codec
from exlq.measurement import LinearRecord, Measurement, OptionRecord
from exlq.models import Model
from exlq.numerics import hessian
from exlq.pipeline import passes, trial
from exlq.pipeline.passes import BlockHessians, InputHessians
from exlq.pipeline.plan import Plan
from exlq.pipeline.progress import Progress
from exlq.types import LinearSpec, Option
from exlq.workspace import Workspace

FLOAT16_BITS = 16


def measure(
    plan: Plan,
    fisher: Mapping[str, Tensor],
    begun: Measurement,
    workspace: Workspace,
    save: Callable[[Measurement], None],
    progress: Progress,
) -> Measurement:
    """Runs the model block by block and tries all options of each block's linears.

    Args:
        fisher: (out_features,) per linear, from `sensitivity.fisher`.
        begun: an earlier record of the same origin; its linears are not measured again.
        save: called with the record after every block.
    """
    model, rows = plan.model, plan.measurement_rows
    states = passes.embedded(model, rows.ids, workspace, passes.STATE_DTYPES[plan.config.states])
    record, known = begun, {linear.key for linear in begun.linears}
    steps = model.n_blocks + 1
    for index in range(model.n_blocks):
        measured = all(linear.spec.key in known for linear in model.linears(index))
        hessians = _forward(model, index, states, rows.heldout, rows.ids, not measured)
        for stage, linears in passes.linears_by_stage(model, index).items():
            wanted = [linear for linear in linears if linear.spec.key not in known]
            if not wanted:
                continue
            act_order = all(plan.codec.sorts_channels(linear.spec) for linear in linears)
            evidence = _evidence(hessians.by_stage.pop(stage), f"block {index}, {stage}", act_order)
            memory.release()
            for linear in wanted:
                weight = model.linear_weight(linear.spec.key)
                tried = _record(plan, linear.spec, weight, evidence, fisher, plan.codec.options(linear.spec))
                record = record.with_linear(tried)
        save(record)
        progress("measuring", index + 1, steps)
    record = _with_ends(plan, record, states, fisher)
    save(record)
    workspace.remove("states")
    progress("measuring", steps, steps)
    return record


def _forward(
    model: Model, index: int, states: Tensor, heldout: Tensor, ids: Tensor, gather: bool
) -> BlockHessians:
    """Runs a block on all rows, in place; gathers the Hessians of its inputs, where these are wanted."""
    hessians = BlockHessians(model.device)
    with model.block(index) as block:
        for rows in passes.batches(ids):
            listener = hessians.listener(heldout[rows]) if gather else None
            out = block.forward(states[rows].float(), listener)
            states[rows] = out.to("cpu", states.dtype)
    return hessians


def _evidence(hessians: InputHessians, what: str, act_order: bool = True) -> trial.Evidence:
    calibration, heldout = hessians.means(what)
    factor = hessian.factor(calibration, act_order=act_order)
    return trial.Evidence(factor, heldout[factor.perm][:, factor.perm])


def _record(
    plan: Plan,
    spec: LinearSpec,
    weight: Tensor,
    evidence: trial.Evidence,
    fisher: Mapping[str, Tensor],
    options: tuple[Option, ...],
) -> LinearRecord:
    generator = torch.Generator().manual_seed(plan.config.seed)
    weight = weight.to(plan.model.device, torch.float32)
    tried = trial.try_options(plan.codec, spec, options, weight, evidence, fisher[spec.key], generator)
    return LinearRecord(
        key=spec.key,
        numel=spec.numel,
        options=tuple(
            _option_record(plan.codec, spec, option, result)
            for option, result in zip(options, tried.options, strict=True)
        ),
        sensitivity=tried.sensitivity,
        sampled_rows=trial.SAMPLED_ROWS if spec.out_features > trial.SAMPLED_ROWS else None,
    )


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


def _with_ends(plan: Plan, record: Measurement, states: Tensor, fisher: Mapping[str, Tensor]) -> Measurement:
    """The record with lm_head, and the embedding, which EXL2 keeps in float16."""
    model, rows = plan.model, plan.measurement_rows
    known = {linear.key for linear in record.linears}
    head = model.head
    if head.key not in known:
        hessians = passes.head_hessians(model, states, rows.heldout, rows.ids)
        evidence = _evidence(hessians, head.key)
        weight = model.linear_weight(head.key)
        record = record.with_linear(
            _record(plan, head, weight, evidence, fisher, plan.codec.head_options(head))
        )
    if model.embedding_key not in known:
        numel = model.vocab_size * model.hidden_size
        kept = OptionRecord("f16", 16.0, numel * FLOAT16_BITS, 0.0, {"bits": [FLOAT16_BITS]}, 0.0, 0.0, 0.0)
        record = record.with_linear(LinearRecord(model.embedding_key, numel, (kept,)))
    return record
