"""What a conversion will take, said before it starts."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from exlq.errors import ConfigError
from exlq.numerics import coupling
from exlq.pipeline import sensitivity, trial
from exlq.pipeline.output import Output
from exlq.pipeline.plan import Plan
from exlq.sizes import format_bytes

PROBE = 1024  # side of the matrices whose product is timed
PROBE_REPEATS = 4
SLOWDOWN = 1.6  # of whole stages over their matrix products, on CPUs
FLOAT_BYTES = 4
GRADIENTS, MEASURING = "gradients", "measuring"


@dataclass(frozen=True)
class Estimate:
    """Seconds by stage, and bytes; rough, from the arithmetic and the matrix product's rate."""

    gemm_flops: float
    stages_s: Mapping[str, float]  # in their order, by the names that progress is told of
    memory_bytes: int
    disk_bytes: int
    output_bytes: int

    @property
    def total_s(self) -> float:
        return sum(self.stages_s.values())

    @property
    def measuring_s(self) -> float:
        return self.stages_s.get(GRADIENTS, 0.0) + self.stages_s.get(MEASURING, 0.0)


def estimate(plan: Plan, outputs: Sequence[Output]) -> Estimate:
    """The estimate for a plan and what it is to write; times one matrix product."""
    rate = gemm_rate(plan.model.device)
    linears = plan.linears
    forward = 2 * plan.numel  # flop a token
    inputs = {(key.rpartition(".")[0], size) for key, size in ((s.key, s.in_features) for s in linears)}
    hessians = sum(2 * size**2 for _, size in inputs)
    gradient = 4 * forward * min(sensitivity.TOKENS, plan.measurement_rows.ids.numel())
    trials = sum(
        len(options) * min(s.out_features, trial.SAMPLED_ROWS) * 1.5 * s.in_features**2
        for s in linears
        for _, options in plan.tried(s)
    )
    sweeps = sum(s.out_features * s.in_features**2 for s in linears)
    factors = sum(size**3 for _, size in inputs)
    measuring = plan.measurement_rows.ids.numel() * (forward + hessians) + trials + factors
    checked = int(plan.rows.heldout.sum()) * plan.rows.ids.shape[1]
    beside = 2 if plan.config.gptq else 1  # the base model runs beside the quantized one
    quantizing = plan.rows.ids.numel() * beside * (forward + hessians) + beside * sweeps + factors
    stages: dict[str, float] = {GRADIENTS: gradient} if _wants_gradients(plan) else {}
    stages |= {MEASURING: measuring} if _is_to_measure(plan) else {}
    stages |= {f"quantizing {output.name}": quantizing for output in outputs}
    stages |= {f"verifying {output.name}": checked * 2 * forward for output in outputs}
    return Estimate(
        gemm_flops=rate,
        stages_s={stage: SLOWDOWN * flop / rate for stage, flop in stages.items()},
        memory_bytes=_memory(plan),
        disk_bytes=disk_bytes(plan, outputs),
        output_bytes=sum(output.estimated_bytes() for output in outputs),
    )


def gemm_rate(device: torch.device) -> float:
    """Floating point operations per second of a float32 matrix product here and now."""
    a = torch.ones(PROBE, PROBE, device=device)
    begin = 0.0
    for repeat in range(PROBE_REPEATS + 1):
        if repeat == 1:  # the first run warms up
            begin = time.perf_counter()
        float((a @ a)[0, 0])
    return 2 * PROBE**3 * PROBE_REPEATS / (time.perf_counter() - begin)


def _is_to_measure(plan: Plan) -> bool:
    return plan.config.measures and plan.config.measurement is None


def _wants_gradients(plan: Plan) -> bool:
    return plan.config.objective == "kl" and (_is_to_measure(plan) or plan.config.couples_rows)


def _memory(plan: Plan) -> int:
    """Two blocks, the Hessians and factors of their inputs, the sweep's arrays, logits."""
    block = max(
        sum(linear.spec.numel for linear in plan.model.linears(i)) for i in range(plan.model.n_blocks)
    )
    widest = max(spec.in_features for spec in plan.linears)
    hessians = 2 * 4 * plan.model.hidden_size**2 + 2 * widest**2
    factor = 6 * widest**2  # float64 twice, float32 twice
    return FLOAT_BYTES * (2 * block + hessians + factor) + trial.SWEEP_BYTES * 2 + (512 << 20)


def disk_bytes(plan: Plan, outputs: Sequence[Output]) -> int:
    """Hidden states of the widest pass, what couples output rows, and the outputs, the largest twice."""
    rows = plan.rows.ids.numel()
    gradient = sensitivity.TOKENS * (plan.model.n_blocks + 2)
    widest = max(spec.in_features for spec in plan.linears)
    states = max(2 * rows * (3 * plan.model.hidden_size + widest), gradient * plan.model.hidden_size)
    coupled = sum(min(coupling.RUN, s.out_features) * s.out_features for s in plan.linears) // 2
    sizes = [output.estimated_bytes() for output in outputs]
    return FLOAT_BYTES * (states + coupled) + sum(sizes) + max(sizes, default=0)


def require_disk(plan: Plan, outputs: Sequence[Output]) -> None:
    """Refuses a conversion for which the disk of the job directory is too small.

    Raises:
        ConfigError: naming what is free and what is wanted.
    """
    wanted = disk_bytes(plan, outputs)
    place = plan.config.out_dir.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < wanted:
        raise ConfigError(
            f"{place} has {format_bytes(free)} free, about {format_bytes(wanted)} is wanted: "
            "make room, choose another -o or take fewer rows (-r)"
        )
