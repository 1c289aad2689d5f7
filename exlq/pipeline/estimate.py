"""What a conversion will take, said before it starts."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from exlq.pipeline import sensitivity, trial
from exlq.pipeline.plan import Plan

PROBE = 1024  # side of the matrices whose product is timed
PROBE_REPEATS = 4
SLOWDOWN = 1.6  # of whole stages over their matrix products, on CPUs
FLOAT_BYTES = 4


@dataclass(frozen=True)
class Estimate:
    """Seconds by stage, and bytes; rough, from the arithmetic and the matrix product's rate."""

    gemm_flops: float
    measuring_s: float
    quantizing_s: float
    memory_bytes: int
    disk_bytes: int
    output_bytes: int

    @property
    def total_s(self) -> float:
        return self.measuring_s + self.quantizing_s


def estimate(plan: Plan) -> Estimate:
    """The estimate for a plan; times one matrix product."""
    rate = gemm_rate(plan.model.device)
    linears = plan.linears
    forward = 2 * plan.numel  # flop a token
    inputs = {(key.rpartition(".")[0], size) for key, size in ((s.key, s.in_features) for s in linears)}
    hessians = sum(2 * size**2 for _, size in inputs)
    gradient = 4 * forward * min(sensitivity.TOKENS, plan.measurement_rows.ids.numel())
    trials = sum(
        len(plan.codec.options(s)) * min(s.out_features, trial.SAMPLED_ROWS) * 1.5 * s.in_features**2
        for s in linears
    )
    sweeps = sum(s.out_features * s.in_features**2 for s in linears)
    factors = sum(size**3 for _, size in inputs)
    measuring = gradient + plan.measurement_rows.ids.numel() * (forward + hessians) + trials + factors
    quantizing = plan.rows.ids.numel() * (forward + hessians) + sweeps + factors
    return Estimate(
        gemm_flops=rate,
        measuring_s=0.0 if plan.config.measurement else SLOWDOWN * measuring / rate,
        quantizing_s=0.0 if plan.config.bits is None else SLOWDOWN * quantizing / rate,
        memory_bytes=_memory(plan),
        disk_bytes=_disk(plan),
        output_bytes=output_bytes(plan),
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


def output_bytes(plan: Plan) -> int:
    """Bytes of the finished directory's tensors."""
    head = plan.codec.storage_bits(plan.model.head, plan.codec.head_option(plan.config.head_bits))
    plain = sum(
        torch.Size(plan.model.weights.shape(name)).numel() * 16 for name in plan.model.plain_tensors()
    )
    return int(((plan.config.bits or 0) * plan.numel + head + plain) / 8)


def _memory(plan: Plan) -> int:
    """One block, the Hessians and factors of its inputs, the sweep's arrays, logits."""
    block = max(
        sum(linear.spec.numel for linear in plan.model.linears(i)) for i in range(plan.model.n_blocks)
    )
    widest = max(spec.in_features for spec in plan.linears)
    hessians = 2 * 4 * plan.model.hidden_size**2 + 2 * widest**2
    factor = 6 * widest**2  # float64 twice, float32 twice
    return FLOAT_BYTES * (block + hessians + factor) + trial.SWEEP_BYTES * 2 + (512 << 20)


def _disk(plan: Plan) -> int:
    """Hidden states of the widest pass, and the output twice while it is replaced."""
    rows = plan.rows.ids.numel()
    gradient = sensitivity.TOKENS * (plan.model.n_blocks + 2)
    widest = max(spec.in_features for spec in plan.linears)
    states = max(rows * (3 * plan.model.hidden_size + widest), gradient * plan.model.hidden_size)
    return FLOAT_BYTES * states + 2 * output_bytes(plan)
