"""What a conversion will take, said before it starts."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from exlq.numerics.precision import quick_products
from exlq.pipeline.output import Output
from exlq.pipeline.plan import Plan
from exlq.sizing import work

PROBE = 1024  # side of the matrices whose product is timed
PROBE_REPEATS = 4


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
        return work.measuring_seconds(self.stages_s)


def estimate(plan: Plan, outputs: Sequence[Output]) -> Estimate:
    """The estimate for a plan and what it is to write; times one matrix product."""
    rate = gemm_rate(plan.model.device)
    linears, tokens = plan.linears, _tokens(plan)
    todo = work.Todo(
        tuple(output.name for output in outputs),
        measures=_is_to_measure(plan),
        gradients=_wants_gradients(plan),
        feedback=plan.config.gptq,
    )
    tries = [sum(len(options) for _, options in plan.tried(spec)) for spec in linears]
    return Estimate(
        gemm_flops=rate,
        stages_s=work.stage_seconds(linears, tries, tokens, todo, rate, plan.model.share),
        memory_bytes=work.memory_bytes(linears, plan.model.hidden_size),
        disk_bytes=disk_bytes(plan, outputs),
        output_bytes=sum(output.estimated_bytes() for output in outputs),
    )


@quick_products()
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


def disk_bytes(plan: Plan, outputs: Sequence[Output]) -> int:
    """What a job's directory holds at most."""
    sizes = [output.estimated_bytes() for output in outputs]
    model = plan.model
    return work.disk_bytes(plan.linears, model.hidden_size, model.n_blocks, _tokens(plan), sizes, model.share)


def _tokens(plan: Plan) -> work.Tokens:
    rows = plan.rows
    heldout = int(rows.heldout.sum()) * rows.ids.shape[1]
    return work.Tokens(rows.ids.numel(), heldout, plan.measurement_rows.ids.numel())
