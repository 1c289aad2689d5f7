"""From a measurement to one option per linear."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from exlq.allocation import solve
from exlq.errors import MeasurementError
from exlq.measurement import LinearRecord, Measurement, OptionRecord, to_items
from exlq.pipeline.plan import Plan, budget_bits
from exlq.types import Allocation, Option


@dataclass(frozen=True)
class Choice:
    """What every linear is stored as, and what that is predicted to cost.

    `loss` is in nats per token, over the decoder's linears and lm_head; `bpw` over the decoder's
    linears alone.
    """

    options: Mapping[str, Option]
    allocation: Allocation
    bpw: float
    loss: float


def allocate(plan: Plan, measurement: Measurement) -> Choice:
    """The least predicted loss within the target.

    Raises:
        MeasurementError: if the record lacks a linear or an option of the model, or has one of another size.
    """
    assert plan.config.bits is not None
    sizes = {spec.key: spec.numel for spec in plan.linears}
    decoder = measurement.only(lambda linear: linear.key in sizes, lambda option: option.format == "exl2")
    missing = sizes.keys() - {linear.key for linear in decoder.linears}
    if missing:
        raise MeasurementError(
            f"the measurement lacks {min(missing)} and {len(missing) - 1} others of this model"
        )
    for linear in decoder.linears:
        if linear.numel != sizes[linear.key]:
            raise MeasurementError(
                f"the measured {linear.key} has {linear.numel} weights, this model's {sizes[linear.key]}: "
                "it was taken of another model, measure again"
            )
    allocation = solve(to_items(decoder), budget_bits(plan, plan.config.bits))
    by_key = {linear.key: linear for linear in decoder.linears}
    chosen = {key: by_key[key].options[index] for key, index in allocation.choice.items()}
    head = plan.codec.head_option(plan.config.head_bits)
    head_loss = _head_record(measurement, plan.model.head.key, head).loss
    options = {key: Option(record.desc, record.qparams) for key, record in chosen.items()}
    return Choice(
        options | {plan.model.head.key: head},
        allocation,
        allocation.total_bits / plan.numel,
        allocation.loss + head_loss,
    )


def _head_record(measurement: Measurement, key: str, option: Option) -> OptionRecord:
    linear: LinearRecord | None = next((item for item in measurement.linears if item.key == key), None)
    found = [] if linear is None else [record for record in linear.options if record.desc == option.desc]
    if not found:
        raise MeasurementError(f"the measurement lacks {key} at {option.desc}; measure again")
    return found[0]
