"""The measuring pass: every option of every linear tried on the unquantized model."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from exlq import memory
from exlq.formats.codec import Codec
from exlq.measurement import LinearRecord, Measurement, OptionRecord
from exlq.models.layout import Linear
from exlq.pipeline import arithmetic, kinds, passes, trial, units
from exlq.pipeline.embedding import embedding_cost
from exlq.pipeline.experts import ExpertInputs
from exlq.pipeline.passes import BlockHessians, InputHessians
from exlq.pipeline.plan import Plan
from exlq.pipeline.progress import Progress
from exlq.pipeline.sensitivity import Sensitivity
from exlq.pipeline.states import HiddenStates
from exlq.pipeline.tensor_cache import hashed
from exlq.pipeline.workers import Handle
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
    model, rows, workers = plan.model, plan.measurement_rows, plan.workers
    record, known = begun, {linear.key for linear in begun.linears}
    steps = model.n_blocks + 1
    measured = [all(linear.spec.key in known for linear in model.linears(i)) for i in range(model.n_blocks)]
    marks = [hashed(plan.origin, index) for index in range(steps)]
    shape, dtype = (*rows.ids.shape, model.hidden_size), passes.STATE_DTYPES[plan.config.states]
    states = HiddenStates(workspace, ("states",), shape, dtype, sides=2 + workers.ahead, device=model.device)
    begin = states.resume(marks[: [*measured, False].index(False) + 1])
    if begin is None:
        states.begin()
        passes.embedded(model, rows.ids, workspace, dtype)
    under_way: deque[tuple[int, list[Pending]]] = deque()

    def finish(most: int) -> None:
        """Waits until the linears of no more than so many blocks are under way."""
        nonlocal record
        while len(under_way) > most:
            done, pending = under_way.popleft()
            for wait in pending:
                record = record.with_linear(wait())
            save(record)
            states.record(marks[done + 1], behind=len(under_way))
            progress("measuring", done + 1, steps)

    for index in range(begin or 0, model.n_blocks):
        experts = ExpertInputs(model, index, rows.heldout, workspace)
        gathering = None if measured[index] else experts
        hessians = _forward(plan, index, states.before("states"), states.after("states"), gathering)
        record = experts.noted(record)
        under_way.append((index, list(_begun(plan, index, hessians, experts, sensitivity, known))))
        states.advance()
        finish(workers.ahead)
    ends = list(_ends(plan, states.before("states"), sensitivity, known))
    finish(0)
    for wait in ends:
        record = record.with_linear(wait())
    save(record)
    states.begin()
    progress("measuring", steps, steps)
    return record


Pending = Callable[[], LinearRecord]  # waits for what is being tried


def _begun(
    plan: Plan,
    index: int,
    hessians: BlockHessians,
    experts: ExpertInputs,
    sensitivity: Sensitivity,
    known: Collection[str],
) -> Iterator[Pending]:
    """Starts trying the options of a block's linears that are not `known`."""
    for stage, linears in passes.linears_by_stage(plan.model, index).items():
        wanted = [linear for linear in linears if linear.spec.key not in known]
        if not wanted:
            continue
        found = hessians.by_stage.pop(stage, None) or experts.hessians(stage)
        evidence = _Evidence(plan, found, f"block {index}, {stage}", linears)
        del found
        memory.release()
        for linear in wanted:
            tried = _record(plan, linear.spec, evidence.of, _costs(plan, sensitivity, linear.spec.key))
            yield partial(_tied, tried, linear.tie)


def _tied(tried: Pending, tie: str | None) -> LinearRecord:
    return replace(tried(), tie=tie)


def _costs(plan: Plan, sensitivity: Sensitivity, key: str) -> Tensor:
    """(out_features,) what a mean squared error of each output of a linear costs, twice."""
    coupling = sensitivity.coupling(key, plan.model.device) if plan.config.couples_rows else None
    return sensitivity.outputs[key] if coupling is None else coupling.costs


def _forward(
    plan: Plan, index: int, states: Tensor, after: Tensor, experts: ExpertInputs | None
) -> BlockHessians:
    """Runs a block on all rows of `states` into `after`; Hessians of its inputs, with `experts` to be filled.

    Where that is None, nothing is gathered. The inputs of experts go to it.
    """
    model, taken = plan.model, plan.measurement_rows
    profile = plan.profile
    hessians = BlockHessians(model.device, profile)
    with profile.reading(model.block(index)) as block:
        for rows in passes.batches(taken.ids):
            look = passes.looking(f"block {index}", rows.start, taken.row_name)
            listener = None
            if experts is not None:
                others = hessians.listener(taken.heldout[rows], look)
                listener = experts.listener(block, rows, others, look)
            with profile.spent(kinds.FORWARDS, arithmetic.forward(model, index, states[rows])):
                out = block.forward(states[rows].float(), listener)
            after[rows] = out.to(after)
    return hessians


class _Evidence:
    """One input's Hessians, factored once for all codecs that may process its channels in any order."""

    def __init__(
        self, plan: Plan, hessians: InputHessians, what: str, linears: Sequence[Linear] = ()
    ) -> None:
        self._plan, self._linears = plan, linears
        self._calibration, self._heldout = map(plan.workers.share, hessians.means(what))
        self._made: dict[bool, Handle] = {}

    def of(self, codec: Codec[Any]) -> Handle:
        """Of the `trial.Evidence` for a codec."""
        act_order = all(codec.sorts_channels(linear.spec) for linear in self._linears)
        if act_order not in self._made:
            config = self._plan.config
            given = (self._calibration, self._heldout, act_order, config.descends, config.gptq)
            self._made[act_order] = self._plan.workers.submit(units.evidence, *given, self._plan.profile)
        return self._made[act_order]


def _record(plan: Plan, spec: LinearSpec, evidence: Callable[[Codec[Any]], Handle], rows: Tensor) -> Pending:
    """Starts on all options of one matrix; `rows`, (out_features,), is what an error of each output costs."""
    workers, seed = plan.workers, plan.config.seed
    weight = workers.share(plan.model.linear_weight(spec.key))
    found = []
    for codec, options in plan.tried(spec):
        given = (codec, spec, options, weight, evidence(codec), rows, seed, plan.profile)
        found.append((codec, options, workers.submit(units.tried, *given)))
    return partial(_finished, plan, spec, found)


def _finished(
    plan: Plan, spec: LinearSpec, found: Sequence[tuple[Codec[Any], Sequence[Option], Handle]]
) -> LinearRecord:
    """The record of one matrix, from what each codec's options did to it."""
    records: list[OptionRecord] = []
    sensitivity: float | None = None
    for codec, options, handle in found:
        trials: trial.Trials = plan.workers.result(handle)
        pairs: Iterable[tuple[Option, trial.Trial]] = zip(options, trials.options, strict=True)
        if plan.config.objective == "output-error":
            pairs = ((option, replace(result, loss=result.err_heldout)) for option, result in pairs)
        else:
            sensitivity = trials.sensitivity
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


def _ends(plan: Plan, states: Tensor, sensitivity: Sensitivity, known: Collection[str]) -> Iterator[Pending]:
    """Starts on lm_head and the embedding, where they are not `known`."""
    model, rows = plan.model, plan.measurement_rows
    if model.head.key not in known and plan.tried(model.head):
        hessians = passes.head_hessians(model, states, rows.heldout, rows.ids, rows.row_name, plan.profile)
        evidence = _Evidence(plan, hessians, model.head.key)
        yield _record(plan, model.head, evidence.of, sensitivity.outputs[model.head.key])
    if model.embedding_key not in known:
        yield _embedding(plan, sensitivity)


def _embedding(plan: Plan, sensitivity: Sensitivity) -> Pending:
    """The embedding, which EXL2 keeps in float16."""
    spec = plan.model.embedding
    kept = OptionRecord("f16", 16.0, 16 * spec.numel, 0.0, {"bits": [16]}, 0.0, 0.0, 0.0)
    if not plan.tried(spec):
        return lambda: LinearRecord(spec.key, spec.numel, (kept,))
    cost = embedding_cost(plan.model, sensitivity, plan.measurement_rows.ids)
    own = plan.workers.share(cost.hessian.to(plan.model.device))
    evidence = plan.workers.submit(units.evidence, own, own, True, True, plan.config.gptq, plan.profile)
    tried = _record(plan, spec, lambda _: evidence, cost.rows)
    if not any(codec.name == "exl2" for codec in plan.codecs):
        return tried
    return partial(_beside, kept, tried)


def _beside(kept: OptionRecord, tried: Pending) -> LinearRecord:
    found = tried()
    return replace(found, options=(kept, *found.options))
