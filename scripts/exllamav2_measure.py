"""What ExLlamaV2 0.3.2 measures: the residual stream's error behind a module, for each way to store it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from exlq.formats import exl2
from exlq.formats.exl2_options import groups_of
from exlq.models.block import Block
from exlq.models.family import ATTENTION
from exlq.models.model import Model
from exlq.models.skeleton import Returns, swapped
from exlq.pipeline import passes
from exlq.types import LinearSpec, Option
from scripts import exllamav2_rounding as rounding
from scripts.exllamav2_options import MODULES

# The norm that reads the residual stream behind attention: the first, in families that have it.
BEHIND_ATTENTION = ("pre_feedforward_layernorm", "post_attention_layernorm")


class Way(NamedTuple):
    """One option of one module."""

    options: Mapping[str, Option]  # by the linear's key
    bits: int
    error: float  # mean over rows of the relative Frobenius error of the residual stream


def measure_block(model: Model, index: int, states: Tensor) -> list[list[Way]]:
    """The ways of attention and of the MLP; `states`, the block's inputs, become its outputs."""
    with model.block(index) as block:
        inverses = input_inverses(block, states)
        weights = {module: _tried(model, index, module, inverses) for module in MODULES}
        errors = _errors(model, index, block, weights, states)
        forward(block, states)
    return [_ways(model, index, module, errors[module]) for module in MODULES]


def linears(model: Model, index: int, module: str) -> list[tuple[LinearSpec, str]]:
    """The module's linears, each with the name of its input."""
    found = model.linears(index)
    return [(linear.spec, linear.stage) for linear in found if f".{module}." in linear.spec.key]


def input_inverses(block: Block, states: Tensor) -> dict[str, rounding.Inverse]:
    """Of every input of the block as it is; a sum over tokens divided by the number of rows, as theirs."""
    sums: dict[str, Tensor] = {}

    def add(stage: str, x: Tensor) -> None:
        sums[stage] = sums[stage] + square(x) if stage in sums else square(x)

    for rows in passes.batches(states):
        block.forward(states[rows], add)
    return {stage: rounding.inverse(total / len(states)) for stage, total in sums.items()}


def square(x: Tensor) -> Tensor:
    """The sum of x xᵀ over tokens."""
    tokens = x.flatten(0, -2)
    return tokens.T @ tokens


def forward(block: Block, states: Tensor) -> None:
    """Replaces the block's inputs by its outputs."""
    for rows in passes.batches(states):
        states[rows] = block.forward(states[rows])


def rounded(model: Model, spec: LinearSpec, option: Option, inverse: rounding.Inverse) -> rounding.Rounded:
    """A linear as it is stored under an option."""
    groups = groups_of(option.qparams, spec.in_features)
    return rounding.quantize(model.linear_weight(spec.key), inverse, groups)


def _tried(
    model: Model, index: int, module: str, inverses: Mapping[str, rounding.Inverse]
) -> list[dict[str, Tensor]]:
    """For every way the weights of the module's linears; equal settings are rounded once."""
    made: dict[tuple[str, str], Tensor] = {}
    for spec, stage in linears(model, index, module):
        for option in {way[_last(spec)].desc: way[_last(spec)] for way in MODULES[module]}.values():
            made[spec.key, option.desc] = rounded(model, spec, option, inverses[stage]).weight()
    specs = [spec for spec, _ in linears(model, index, module)]
    return [{spec.key: made[spec.key, way[_last(spec)].desc] for spec in specs} for way in MODULES[module]]


def _ways(model: Model, index: int, module: str, errors: Sequence[float]) -> list[Way]:
    specs = [spec for spec, _ in linears(model, index, module)]
    found = []
    for way, error in zip(MODULES[module], errors, strict=True):
        options = {spec.key: way[_last(spec)] for spec in specs}
        bits = sum(_bits(spec, options[spec.key]) for spec in specs)
        found.append(Way(options, bits, error))
    return found


def _bits(spec: LinearSpec, option: Option) -> int:
    return exl2.storage_bits(groups_of(option.qparams, spec.in_features), spec.out_features)


def _last(spec: LinearSpec) -> str:
    return spec.key.rpartition(".")[2]


@torch.no_grad()
def _errors(
    model: Model,
    index: int,
    block: Block,
    tried: Mapping[str, Sequence[Mapping[str, Tensor]]],
    states: Tensor,
) -> dict[str, list[float]]:
    """By module, of every way; the block is left as it was."""
    own = {linear.spec.key: model.linear_weight(linear.spec.key).float() for linear in model.linears(index)}
    sums = {module: [0.0] * len(ways) for module, ways in tried.items()}
    for rows in passes.batches(states):
        for module, run in _runs(block, states[rows]).items():
            wanted = run()
            for i, weights in enumerate(tried[module]):
                _set(block, weights)
                sums[module][i] += _relative(run(), wanted)
            _set(block, {key: own[key] for key in tried[module][0]})
    return {module: [total / len(states) for total in totals] for module, totals in sums.items()}


def _runs(block: Block, hidden: Tensor) -> dict[str, Callable[[], Tensor]]:
    """By module, what gives the residual stream behind it with that module's present weights."""
    attended: list[Tensor] = []
    attention = block.module.get_submodule(ATTENTION)
    handle = attention.register_forward_hook(lambda _module, _args, out: attended.append(out[0]))
    _behind_attention(block, hidden)
    handle.remove()

    def behind_mlp() -> Tensor:
        with swapped(block.module, **{ATTENTION: Returns((attended[0], None))}):
            return block.call(hidden)

    return {ATTENTION: lambda: _behind_attention(block, hidden), "mlp": behind_mlp}


def _behind_attention(block: Block, hidden: Tensor) -> Tensor:
    def stop(_module: Any, args: tuple[Tensor, ...]) -> None:
        raise _ReachedError(args[0])

    children = dict(block.module.named_children())
    norm = next(children[name] for name in BEHIND_ATTENTION if name in children)
    handle = norm.register_forward_pre_hook(stop)
    try:
        block.call(hidden)
    except _ReachedError as reached:
        return reached.x
    finally:
        handle.remove()
    raise AssertionError("the block never reached the norm behind attention")


class _ReachedError(Exception):
    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = x


def _set(block: Block, weights: Mapping[str, Tensor]) -> None:
    for key, weight in weights.items():
        block.set_weight(key, weight)


def _relative(found: Tensor, wanted: Tensor) -> float:
    """The rows' relative Frobenius errors, added up."""
    error, whole = (x.flatten(1).norm(dim=1) for x in (found - wanted, wanted))
    return float((error / whole).sum())
