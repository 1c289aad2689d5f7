"""The second pass: every linear rounded for good, on inputs from the already quantized model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from exlq import memory
from exlq.errors import HessianError, VerifyError
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
from exlq.pipeline.states import HiddenStates
from exlq.pipeline.tensor_cache import Kept, TensorCache, basis, bytes_hash, hashed, names
from exlq.types import LinearSpec, Option
from exlq.workspace import Workspace

Stored = tuple[LinearSpec, Mapping[str, Tensor]]

JUDGED_TOKENS = 4096  # of the calibration, that learn how far corrections hold
NOTHING_KEPT = TensorCache(None)
QUANTIZED, BASE = "states", "base-states"


@dataclass(frozen=True)
class Rounding:
    """How the linears of one model are rounded for good."""

    plan: Plan
    codec: Codec[Any]
    options: Mapping[str, Option]
    sensitivity: Sensitivity | None = None  # None: errors are not handed on between rows
    cache: TensorCache = NOTHING_KEPT
    # told of every linear how often its damping was raised and how many of its input channels are dead
    note: Callable[[str, int, int], None] = lambda key, raised, dead: None

    @property
    def follows_base(self) -> bool:
        """Whether the base model runs beside the quantized one."""
        methods = self.plan.config.methods
        return self.plan.config.gptq and (methods.input_correction or methods.residual_correction)

    def rounded(
        self, spec: LinearSpec, name: str, factor: Factor, drift: DriftSum | None
    ) -> tuple[Stored, Tensor]:
        """One linear's stored tensors, kept as `name`, and the (out, in) float32 weight they give back."""
        weight = self.plan.model.linear_weight(spec.key).to(factor.pivots, copy=True)  # into aligned memory
        if drift is not None:
            weight = drift.corrected(weight, factor)
        coupling = None if self.sensitivity is None else self.sensitivity.coupling(spec.key, weight.device)
        option = self.options[spec.key]
        tensors, restored = trial.quantize(self.codec, spec, option, weight, factor, coupling)
        self.cache.write(name, Kept(tensors, factor.raised, factor.dead))
        self.note(spec.key, factor.raised, factor.dead)
        return (spec, tensors), restored


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
            with model.block(index) as block:
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
class Route:
    """What of a pass is in the cache, and what is to be done."""

    names: Mapping[str, str]  # of every linear's tensors in the cache
    places: Sequence[str]  # what is quantized before each block, and before the head
    lacking: Sequence[int]  # blocks with a linear that is not in the cache; their number for the head

    @classmethod
    def of(cls, rounding: Rounding, embedding: Tensor | None) -> Route:
        plan, cache = rounding.plan, rounding.cache
        begin = hashed(
            basis(plan, rounding.codec.name), None if embedding is None else bytes_hash(embedding.cpu())
        )
        found, places = names(plan, rounding.options, begin)
        stages = [[linear.spec.key for linear in plan.model.linears(i)] for i in range(plan.model.n_blocks)]
        stages.append([plan.model.head.key] if plan.model.head.key in found else [])
        lacking = [i for i, keys in enumerate(stages) if not all(cache.has(found[key]) for key in keys)]
        return cls(found, places, lacking)

    def found(self, rounding: Rounding, spec: LinearSpec) -> Stored | None:
        """A linear's tensors from the cache, if they are there."""
        kept = rounding.cache.read(self.names[spec.key])
        if kept is None:
            return None
        rounding.note(spec.key, kept.raised, kept.dead)
        return spec, kept.tensors

    def kept(self, rounding: Rounding, spec: LinearSpec) -> Stored:
        """A linear's tensors from the cache.

        Raises:
            VerifyError: if they are no longer what was put there.
        """
        found = self.found(rounding, spec)
        if found is None:
            rounding.cache.drop(self.names[spec.key])
            raise VerifyError(f"{spec.key} was damaged on the disk since it was quantized: run again")
        return found


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
        states = HiddenStates(workspace, followed, (*ids.shape, model.hidden_size), dtype)
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
    staged = block.staged(workspace.tensor, rows_at_once)
    quantized = Pass(staged, states.before(QUANTIZED), states.after(QUANTIZED))
    if streams.base_model is None:
        yield from _stages(rounding, block, index, streams, route, quantized, None)
        return
    with streams.base_model.block(index) as twin:
        staged = twin.staged(lambda name, shape: workspace.tensor(f"base-{name}", shape), rows_at_once)
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
    for stage, linears in passes.linears_by_stage(rounding.plan.model, index).items():
        known = {linear.spec.key: route.found(rounding, linear.spec) for linear in linears}
        evidence: tuple[Factor, DriftSum | None] | None = None
        if all(known.values()):
            for each in both:
                each.staged.skip(stage, each.states)
        else:
            memory.release()
            total, drift = _moments(rounding, stage, linears[0].spec.in_features, streams, quantized, base)
            act_order = all(rounding.codec.sorts_channels(linear.spec) for linear in linears)
            what = f"block {index}, {stage}"
            evidence = factored(rounding.plan.config, total, what, act_order), drift
            memory.release()
        for linear in linears:
            spec, stored = linear.spec, known[linear.spec.key]
            if stored is None:
                assert evidence is not None
                stored, restored = rounding.rounded(spec, route.names[spec.key], *evidence)
            else:
                restored = rounding.codec.unpack(stored[1], spec, rounding.options[spec.key])
            block.set_weight(spec.key, restored)
            yield stored
    for each in both:
        each.staged.outputs(each.states, each.after)


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


def _head(rounding: Rounding, streams: Streams, name: str) -> Stored:
    plan, model = rounding.plan, rounding.plan.model
    total = HessianSum.zeros(model.hidden_size, model.device)
    drift = DriftSum(model.hidden_size, None, model.device)
    quantized, base = streams.states.before(QUANTIZED), streams.base
    follows = base is not None and plan.config.methods.input_correction
    for rows in passes.batches(quantized):
        x = model.final_norm(quantized[rows].float())
        total.add(x)
        if follows:
            assert base is not None
            drift.add(model.final_norm(base[rows].float()), x, None, streams.judges(rows))
    factor = factored(plan.config, total, model.head.key)
    return rounding.rounded(model.head, name, factor, drift if follows else None)[0]


def factored(config: ConvertConfig, total: HessianSum, what: str, act_order: bool = True) -> Factor:
    """The factor that is rounded by; `what` names the input in an error."""
    try:
        factor = hessian.factor(total.calibrated(), act_order=act_order)
        factor = factor if config.descends else factor._replace(hessian=None)
        return factor if config.gptq else factor.without_feedback()
    except HessianError as exc:
        raise HessianError(f"{what}: {exc}") from exc
