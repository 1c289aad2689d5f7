"""The second pass: every linear rounded for good, on inputs from the already quantized model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from exlq import memory
from exlq.models.block import Block
from exlq.models.layout import Linear
from exlq.models.model import Model
from exlq.models.staged import StagedPass
from exlq.numerics.drift import DriftSum
from exlq.numerics.hessian import HessianSum
from exlq.pipeline import arithmetic, kinds, passes, units
from exlq.pipeline.on_device import keeping
from exlq.pipeline.progress import Progress
from exlq.pipeline.rounding import Rounding, Route, Stored
from exlq.pipeline.states import HiddenStates
from exlq.pipeline.tensor_cache import Kept
from exlq.pipeline.workers import in_order
from exlq.types import LinearSpec
from exlq.workspace import Workspace

JUDGED_TOKENS = 4096  # of the calibration, that learn how far corrections hold
QUANTIZED, BASE = "states", "base-states"


def quantized_linears(
    rounding: Rounding, workspace: Workspace, progress: Progress, embedding: Tensor | None = None
) -> Iterator[Stored]:
    """Every linear's stored tensors, block by block in true sequence, then lm_head's, where it has an option.

    What a block hands on comes from its quantized linears; inside a block, each stage's Hessian
    is taken with the stages before it quantized. The base model runs beside, on the same rows, so that
    each linear can make up for what the ones before have changed. Held-out rows take no part.
    What is in the cache is not rounded again, and blocks run only where a later linear wants their outputs.
    `embedding`, (vocab, hidden_size), is the quantized one.
    """
    model = rounding.plan.model
    route = Route.of(rounding, embedding)
    streams = Streams.begun(rounding, workspace, embedding, route) if route.lacking else None
    stage, steps = f"quantizing {rounding.codec.name}", model.n_blocks + 1
    for index in range(model.n_blocks):
        if streams is None or not streams.begin <= index <= route.lacking[-1]:
            for linear in model.linears(index):
                yield route.kept(rounding, linear.spec)
        else:
            with rounding.plan.profile.reading(model.block(index)) as block:
                yield from _block(rounding, block, index, streams, route, workspace)
            streams.states.turn(route.places[index + 1])
        progress(stage, index + 1, steps)
    if streams is not None and model.n_blocks in route.lacking:
        yield _head(rounding, streams, route.names[model.head.key])
    elif model.head.key in rounding.options:
        yield route.kept(rounding, model.head)
    if streams is not None:
        streams.states.begin()
    progress(stage, steps, steps)


@dataclass(frozen=True)
class Streams:
    """Hidden states after the quantized prefix, and in the base model, where that is followed."""

    states: HiddenStates  # (n_rows, length, hidden_size) of each
    begin: int  # the block they stand before
    base_model: Model | None

    @classmethod
    def begun(
        cls, rounding: Rounding, workspace: Workspace, embedding: Tensor | None, route: Route
    ) -> Streams:
        """From what an earlier run has left before the first block there is work in, else from the tokens."""
        plan, model = rounding.plan, rounding.plan.model
        ids, dtype = plan.quantized_on, passes.STATE_DTYPES[plan.config.states]
        followed = (QUANTIZED, BASE) if rounding.follows_base else (QUANTIZED,)
        shape = (*ids.shape, model.hidden_size)
        states = HiddenStates(workspace, followed, shape, dtype, device=model.device)
        begin = states.resume(route.places[: route.lacking[0] + 1])
        if begin is None:
            states.begin()
            for name, weight in zip(followed, (embedding, None), strict=False):
                passes.embedded(model, ids, workspace, dtype, weight, name)
        return cls(states, begin or 0, model.twin() if rounding.follows_base else None)

    @property
    def base(self) -> Tensor | None:
        return None if self.base_model is None else self.states.before(BASE)

    def judges(self, rows: slice) -> bool:
        """Whether these rows judge corrections: every n-th batch, about 4096 tokens in all."""
        n_rows, length = self.states.shape[:2]
        at_once = passes.rows_at_once(length)
        every = max(2, n_rows * length // JUDGED_TOKENS)
        return bool(rows.start // at_once % every == every - 1)


def _block(
    rounding: Rounding, block: Block, index: int, streams: Streams, route: Route, workspace: Workspace
) -> Iterator[Stored]:
    states = streams.states
    rows_at_once = passes.rows_at_once(states.shape[1])
    device = rounding.plan.model.device
    staged = block.staged(keeping(workspace, device), rows_at_once, frees=True)
    quantized = Pass(staged, states.before(QUANTIZED), states.after(QUANTIZED))
    if streams.base_model is None:
        yield from _stages(rounding, block, index, streams, route, quantized, None)
        return
    with rounding.plan.profile.reading(streams.base_model.block(index)) as twin:
        staged = twin.staged(keeping(workspace, device, "base-"), rows_at_once, quantized.staged, frees=True)
        base = Pass(staged, states.before(BASE), states.after(BASE))
        yield from _stages(rounding, block, index, streams, route, quantized, base)


class Pass(NamedTuple):
    """One model's way through a block."""

    staged: StagedPass
    states: Tensor
    after: Tensor


def _stages(
    rounding: Rounding,
    block: Block,
    index: int,
    streams: Streams,
    route: Route,
    quantized: Pass,
    base: Pass | None,
) -> Iterator[Stored]:
    both = [each for each in (quantized, base) if each is not None]
    spent, model = rounding.plan.profile.spent, rounding.plan.model
    for stage, linears in passes.linears_by_stage(rounding.plan.model, index).items():
        known = {linear.spec.key: route.found(rounding, linear.spec) for linear in linears}
        rounded: Iterator[tuple[Kept, Tensor]] = iter(())
        if all(known.values()):
            for each in both:
                with spent(kinds.FORWARDS):
                    each.staged.skip(stage, each.states)
        else:
            memory.release()
            with spent(kinds.FORWARDS):
                total, drift = _moments(rounding, linears[0], streams, quantized, base)
            act_order = all(rounding.codec.sorts_channels(linear.spec) for linear in linears)
            what = f"block {index}, {stage}"
            lacking = [linear.spec for linear in linears if known[linear.spec.key] is None]
            rounded = _rounded(rounding, lacking, total, drift, what, act_order)
        for linear in linears:
            spec, stored = linear.spec, known[linear.spec.key]
            if stored is None:
                found, restored = next(rounded)
                stored = rounding.keep(spec, route.names[spec.key], found, quantized.staged.reached(stage))
            else:
                restored = rounding.codec.unpack(stored[1], spec, rounding.options[spec.key])
            block.set_weight(spec.key, restored)
            yield stored
    for each in both:
        with spent(
            kinds.FORWARDS, arithmetic.forward(model, index, each.states)
        ):  # all of the block's stages
            each.staged.outputs(each.states, each.after)


def _rounded(
    rounding: Rounding,
    specs: Sequence[LinearSpec],
    total: HessianSum,
    drift: DriftSum | None,
    what: str,
    act_order: bool = True,
) -> Iterator[tuple[Kept, Tensor]]:
    """What linears with one input are stored as, and the (out, in) float32 weights that this gives back."""
    workers, config = rounding.plan.workers, rounding.plan.config
    factor = workers.submit(units.factored, config, total, what, act_order, rounding.plan.profile)
    shared = workers.share(drift)
    memory.release()
    return in_order(workers, (rounding.unit(spec, factor, shared) for spec in specs))


def _moments(
    rounding: Rounding, linear: Linear, streams: Streams, quantized: Pass, base: Pass | None
) -> tuple[HessianSum, DriftSum | None]:
    """The Hessian of a stage's inputs, and how these have drifted from the base model's."""
    model, methods, profile = rounding.plan.model, rounding.plan.config.methods, rounding.plan.profile
    stage, in_features = linear.stage, linear.spec.in_features
    total = HessianSum.zeros(in_features, model.device)
    if base is None:
        for _, x in quantized.staged.inputs(stage, quantized.states):
            with profile.spent(kinds.HESSIANS, arithmetic.moment(x)):
                total.add(x)
        return total, None
    closes = quantized.staged.closes(stage) and not model.family.norms_outputs
    follows_stream = closes and methods.residual_correction
    drift = DriftSum(in_features, model.hidden_size if follows_stream else None, model.device)
    both = (each.staged.inputs(stage, each.states) for each in (quantized, base))
    for (rows, x), (_, wanted) in zip(*both, strict=True):
        with profile.spent(kinds.HESSIANS, arithmetic.moment(x)):
            total.add(x)
        stream = None
        if follows_stream:
            there = quantized.staged.residual(quantized.states, rows)
            stream = (base.staged.residual(base.states, rows) - there).to(x.device)
        judged = streams.judges(rows)
        with profile.spent(kinds.DRIFT, arithmetic.drift(x, stream, judged)):
            drift.add(wanted if methods.input_correction else x, x, stream, judged)
    return total, drift


def _head(rounding: Rounding, streams: Streams, name: str) -> Stored:
    plan, model = rounding.plan, rounding.plan.model
    total = HessianSum.zeros(model.hidden_size, model.device)
    drift = DriftSum(model.hidden_size, None, model.device)
    quantized, base = streams.states.before(QUANTIZED), streams.base
    follows = base is not None and plan.config.methods.input_correction
    for rows in passes.batches(quantized):
        x = model.final_norm(quantized[rows].float())
        with plan.profile.spent(kinds.HESSIANS, arithmetic.moment(x)):
            total.add(x)
        if follows:
            assert base is not None
            judged = streams.judges(rows)
            with plan.profile.spent(kinds.DRIFT, arithmetic.drift(x, None, judged)):
                drift.add(model.final_norm(base[rows].float()), x, None, judged)
    found, _ = next(_rounded(rounding, [model.head], total, drift if follows else None, model.head.key))
    return rounding.keep(model.head, name, found)
