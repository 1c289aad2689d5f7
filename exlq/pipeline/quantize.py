"""The second pass: every linear rounded for good, on inputs from the already quantized model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from exlq import memory
from exlq.errors import HessianError
from exlq.models.block import Block
from exlq.numerics import hessian
from exlq.numerics.hessian import Factor, HessianSum
from exlq.pipeline import passes, trial
from exlq.pipeline.plan import Plan
from exlq.pipeline.progress import Progress
from exlq.types import LinearSpec, Option
from exlq.workspace import Workspace


def quantized_linears(
    plan: Plan, options: Mapping[str, Option], workspace: Workspace, progress: Progress
) -> Iterator[tuple[LinearSpec, dict[str, Tensor]]]:
    """Every linear's stored tensors, block by block in true sequence, then lm_head's.

    What a block hands on comes from its quantized linears; inside a block, each stage's Hessian
    is taken with the stages before it quantized. Held-out rows take no part.
    """
    model, rows = plan.model, plan.rows
    ids = rows.ids[~rows.heldout]
    states = passes.embedded(model, ids, workspace, passes.STATE_DTYPES[plan.config.states])
    for index in range(model.n_blocks):
        with model.block(index) as block:
            yield from _block(plan, block, index, options, states, workspace)
        progress("quantizing", index + 1, model.n_blocks + 1)
    yield _head(plan, options[model.head.key], states, ids)
    workspace.remove("states")
    progress("quantizing", model.n_blocks + 1, model.n_blocks + 1)


def _block(
    plan: Plan,
    block: Block,
    index: int,
    options: Mapping[str, Option],
    states: Tensor,
    workspace: Workspace,
) -> Iterator[tuple[LinearSpec, dict[str, Tensor]]]:
    staged = block.staged(workspace.tensor, passes.rows_at_once(states.shape[1]))
    for stage, linears in passes.linears_by_stage(plan.model, index).items():
        total = HessianSum.zeros(linears[0].spec.in_features, plan.model.device)
        for _, x in staged.inputs(stage, states):
            total.add(x)
        act_order = all(plan.codec.sorts_channels(linear.spec) for linear in linears)
        factor = _factor(total, f"block {index}, {stage}", act_order)
        memory.release()
        for linear in linears:
            weight = plan.model.linear_weight(linear.spec.key)
            tensors, restored = trial.quantize(
                plan.codec, linear.spec, options[linear.spec.key], weight, factor
            )
            block.set_weight(linear.spec.key, restored)
            yield linear.spec, tensors
    staged.outputs(states, states)


def _head(plan: Plan, option: Option, states: Tensor, ids: Tensor) -> tuple[LinearSpec, dict[str, Tensor]]:
    model = plan.model
    total = HessianSum.zeros(model.hidden_size, model.device)
    for rows in passes.batches(ids):
        total.add(model.final_norm(states[rows].float()))
    weight = model.linear_weight(model.head.key)
    tensors, _ = trial.quantize(plan.codec, model.head, option, weight, _factor(total, model.head.key))
    return model.head, tensors


def _factor(total: HessianSum, what: str, act_order: bool = True) -> Factor:
    try:
        return hessian.factor(total.mean(), act_order=act_order)
    except HessianError as exc:
        raise HessianError(f"{what}: {exc}") from exc
