"""What a conversion takes: floating point operations by stage, memory and disk, from shapes and tokens.

Rough by design: the arithmetic of whole stages, times what they have been seen to take over it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from exlq.sizing import flops
from exlq.types import LinearSpec

SLOWDOWN = 1.5  # of whole stages over their matrix products, on CPUs: scripts/bench_scale.py
TRIAL_S = 2.5e-5  # beside them, for each input channel and option of a linear: scales, columns, calls
ROUNDING_S = 3e-4  # likewise of a linear rounded for good
WALKS = 3  # of a descent
FLOAT_BYTES = 4
GRADIENTS, MEASURING = "gradients", "measuring"
GRADIENT_TOKENS = 8192  # of `pipeline.sensitivity.TOKENS`
SAMPLED_ROWS, SWEEP_BYTES = 1024, 192 << 20  # of `pipeline.trial`
JUDGED_EVERY = 8  # of its rows, SAMPLED_ROWS over HELDOUT_ROWS there
FLOAT64 = 2  # times as long as float32
COUPLED_ROWS = 1024  # of `numerics.coupling.RUN`
PROCESS_BYTES = 512 << 20  # libraries, tokens, logits
Share = Callable[[LinearSpec], float]  # the part of all tokens that reaches a linear
PROBE, PROBE_S = 512, 0.1  # side of the matrices whose product is timed, and for how long


@dataclass(frozen=True)
class Tokens:
    """Tokens of the passes: all to quantize on, of those held out, all to measure on."""

    quantize: int
    heldout: int
    measure: int


@dataclass(frozen=True)
class Todo:
    """Which stages there are: `outputs` names the formats to be made."""

    outputs: tuple[str, ...]
    measures: bool = True
    gradients: bool = True
    feedback: bool = True  # by GPTQ: the base model runs beside the quantized one


def stage_flop(
    linears: Sequence[LinearSpec],
    tries: Sequence[int],
    tokens: Tokens,
    todo: Todo,
    share: Share = lambda _: 1.0,
) -> dict[str, float]:
    """Operations by stage, in their order.

    Args:
        tries: options measured of each linear, over all formats.
    """
    forward = sum(flops.forward(spec.numel, 1) * share(spec) for spec in linears)
    inputs = {(spec.key.rpartition(".")[0], spec.in_features): share(spec) for spec in linears}
    hessians = sum(flops.second_moment(size, 1) * part for (_, size), part in inputs.items())
    drift = sum(flops.cross_moment(size, size, 1) * part for (_, size), part in inputs.items())
    factors = FLOAT64 * sum(flops.factor(size) for _, size in inputs)
    trials = sum(
        flops.trials(spec.in_features, rows, rows // JUDGED_EVERY, n)
        + flops.descent(spec.in_features, rows // JUDGED_EVERY, WALKS, n)
        for spec, n in zip(linears, tries, strict=True)
        for rows in [min(spec.out_features, SAMPLED_ROWS)]
    )
    sweeps = sum(
        flops.sweep(spec.in_features, spec.out_features)
        + flops.descent(spec.in_features, spec.out_features, WALKS)
        for spec in linears
    )
    beside, drift = (2, drift) if todo.feedback else (1, 0.0)
    quantizing = tokens.quantize * (beside * forward + hessians + drift) + beside * sweeps + factors
    stages: dict[str, float] = {}
    if todo.gradients:
        stages[GRADIENTS] = 4 * forward * min(GRADIENT_TOKENS, tokens.measure)
    if todo.measures:
        stages[MEASURING] = tokens.measure * (forward + hessians) + trials + factors
    stages |= {f"quantizing {name}": quantizing for name in todo.outputs}
    return stages | {f"verifying {name}": tokens.heldout * 2 * forward for name in todo.outputs}


def stage_seconds(
    linears: Sequence[LinearSpec],
    tries: Sequence[int],
    tokens: Tokens,
    todo: Todo,
    rate: float,
    share: Share = lambda _: 1.0,
) -> dict[str, float]:
    """Seconds by stage at `rate` operations per second of matrix products; arguments of `stage_flop`."""
    beside = {
        MEASURING: TRIAL_S * sum(spec.in_features * n for spec, n in zip(linears, tries, strict=True)),
        **{f"quantizing {name}": ROUNDING_S * sum(s.in_features for s in linears) for name in todo.outputs},
    }
    flop = stage_flop(linears, tries, tokens, todo, share)
    return {stage: SLOWDOWN * n / rate + beside.get(stage, 0.0) for stage, n in flop.items()}


def measuring_seconds(stages_s: Mapping[str, float]) -> float:
    """Of them those before anything is quantized."""
    return stages_s.get(GRADIENTS, 0.0) + stages_s.get(MEASURING, 0.0)


def memory_bytes(linears: Sequence[LinearSpec], hidden_size: int) -> int:
    """Two blocks, the Hessians and factors of their inputs, the sweep's arrays, logits."""
    blocks: Counter[str] = Counter()
    for spec in linears:
        blocks[spec.key.split(".")[2]] += spec.numel  # model.layers.7.…
    widest = max(spec.in_features for spec in linears)
    hessians = 2 * 4 * hidden_size**2 + 2 * widest**2
    factor = 6 * widest**2  # float64 twice, float32 twice
    return FLOAT_BYTES * (2 * max(blocks.values()) + hessians + factor) + SWEEP_BYTES * 2 + PROCESS_BYTES


def disk_bytes(
    linears: Sequence[LinearSpec],
    hidden_size: int,
    n_blocks: int,
    tokens: Tokens,
    sizes: Sequence[int],
    share: Share = lambda _: 1.0,
) -> int:
    """Hidden states of the widest pass, what couples output rows, and the outputs, the largest twice.

    States lie there before and after a block, of the base and of the quantized model, those inside a block
    beside them; a tenth is for rows of random tokens. Quantized tensors are kept beside the outputs.

    Args:
        sizes: bytes of each output.
    """
    widest = max(spec.in_features for spec in linears if share(spec) == 1.0)  # experts' inputs are not kept
    passes = 22 * tokens.quantize * (4 * hidden_size + widest) // 10
    states = max(passes, GRADIENT_TOKENS * (n_blocks + 2) * hidden_size)
    runs = ((spec, min(COUPLED_ROWS, spec.out_features)) for spec in linears)
    coupled = sum(run * s.out_features for s, run in runs if share(s) == 1.0 or _couples(share(s), run)) // 2
    return FLOAT_BYTES * (states + coupled) + 2 * sum(sizes) + max(sizes, default=0)


def _couples(share: float, run: int) -> bool:
    """Whether gradients enough reach an expert, as `CouplingSum.couples` has it."""
    return share * GRADIENT_TOKENS >= run


def gemm_rate() -> float:
    """Floating point operations per second of numpy's float32 matrix product here and now."""
    a = np.ones((PROBE, PROBE), dtype=np.float32)
    a @ a  # warms up
    begin, repeats = time.perf_counter(), 0
    while time.perf_counter() - begin < PROBE_S:
        a @ a
        repeats += 1
    return 2 * PROBE**3 * repeats / (time.perf_counter() - begin)
