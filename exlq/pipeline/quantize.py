"""The second pass: every linear rounded for good, on inputs from the already quantized model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from exlq import memory
from exlq.errors import HessianError
from exlq.formats.codec import Codec
from exlq.models.block import Block
from exlq.numerics import hessian
from exlq.numerics.hessian import Factor, HessianSum
from exlq.pipeline import passes, trial
from exlq.pipeline.config import ConvertConfig
from exlq.pipeline.plan import Plan
from exlq.pipeline.progress import Progress
from exlq.types import LinearSpec, Option
from exlq.workspace import Workspace

Stored = tuple[LinearSpec, dict[str, Tensor]]


def quantized_linears(
    plan: Plan,
    codec: Codec[Any],
    options: Mapping[str, Option],
    workspace: Workspace,
    progress: Progress,
    embedding: Tensor | None = None,
) -> Iterator[Stored]:
    """Every linear's stored tensors, block by block in true sequence, then lm_head's, where it has an option.

    What a block hands on comes from its quantized linears; inside a block, each stage's Hessian
    is taken with the stages before it quantized. Held-out rows take no part. `embedding`,
    (vocab, hidden_size), is the quantized one.
    """
    model, rows = plan.model, plan.rows
    ids = rows.ids[~rows.heldout]
    dtype = passes.STATE_DTYPES[plan.config.states]
    states = passes.embedded(model, ids, workspace, dtype, embedding)
    for index in range(model.n_blocks):
        with model.block(index) as block:
            yield from _block(plan, codec, block, index, options, states, workspace)
        progress("quantizing", index + 1, model.n_blocks + 1)
    if model.head.key in options:
        yield _head(plan, codec, options[model.head.key], states, ids)
    workspace.remove("states")
    progress("quantizing", model.n_blocks + 1, model.n_blocks + 1)


def _block(
    plan: Plan,
    codec: Codec[Any],
    block: Block,
    index: int,
    options: Mapping[str, Option],
    states: Tensor,
    workspace: Workspace,
) -> Iterator[Stored]:
    staged = block.staged(workspace.tensor, passes.rows_at_once(states.shape[1]))
    for stage, linears in passes.linears_by_stage(plan.model, index).items():
        total = HessianSum.zeros(linears[0].spec.in_features, plan.model.device)
        for _, x in staged.inputs(stage, states):
            total.add(x)
        act_order = all(codec.sorts_channels(linear.spec) for linear in linears)
        factor = factored(plan.config, total, f"block {index}, {stage}", act_order)
        memory.release()
        for linear in linears:
            weight = plan.model.linear_weight(linear.spec.key)
            option = options[linear.spec.key]
            tensors, restored = trial.quantize(codec, linear.spec, option, weight, factor)
            block.set_weight(linear.spec.key, restored)
            yield linear.spec, tensors
    staged.outputs(states, states)


def _head(plan: Plan, codec: Codec[Any], option: Option, states: Tensor, ids: Tensor) -> Stored:
    model = plan.model
    total = HessianSum.zeros(model.hidden_size, model.device)
    for rows in passes.batches(ids):
        total.add(model.final_norm(states[rows].float()))
    weight = model.linear_weight(model.head.key)
    factor = factored(plan.config, total, model.head.key)
    tensors, _ = trial.quantize(codec, model.head, option, weight, factor)
    return model.head, tensors


def factored(config: ConvertConfig, total: HessianSum, what: str, act_order: bool = True) -> Factor:
    """The factor that is rounded by; `what` names the input in an error."""
    try:
        factor = hessian.factor(total.mean(), act_order=act_order)
        return factor if config.gptq else factor.without_feedback()
    except HessianError as exc:
        raise HessianError(f"{what}: {exc}") from exc
