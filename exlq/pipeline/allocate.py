"""From a measurement to one option per linear."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from exlq.allocation import solve
from exlq.errors import FormatError, MeasurementError
from exlq.measurement import LinearRecord, Measurement, OptionRecord, to_items
from exlq.pipeline.plan import Plan, budget_bits
from exlq.types import Allocation, LinearSpec, Option


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
    keys = {spec.key for spec in plan.linears}
    decoder = measurement.only(lambda linear: linear.key in keys, lambda option: option.format == "exl2")
    missing = keys - {linear.key for linear in decoder.linears}
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise MeasurementError(
            f"the measurement lacks {min(missing)}{others}: it is not of this model, measure again"
        )
    for spec in plan.linears:
        _require_fitting(plan, spec, next(linear for linear in decoder.linears if linear.key == spec.key))
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


def _require_fitting(plan: Plan, spec: LinearSpec, measured: LinearRecord) -> None:
    """Refuses records of a matrix of another shape, or with sizes that its options do not have."""
    if measured.numel != spec.numel:
        raise MeasurementError(
            f"the measured {spec.key} has {measured.numel} weights, this model's {spec.numel}: "
            "it was taken of another model, measure again"
        )
    for option in measured.options:
        stored = _stored_bits(plan, spec, option)
        if stored != option.total_bits:
            raise MeasurementError(
                f"{spec.key} at {option.desc}: {option.total_bits} bits are recorded, "
                f"{stored} are stored; measure again"
            )


def _stored_bits(plan: Plan, spec: LinearSpec, option: OptionRecord) -> int:
    try:
        return plan.codec.storage_bits(spec, Option(option.desc, option.qparams))
    except FormatError as exc:
        raise MeasurementError(f"{spec.key} at {option.desc}: {exc}; measure again") from exc


def _head_record(measurement: Measurement, key: str, option: Option) -> OptionRecord:
    linear: LinearRecord | None = next((item for item in measurement.linears if item.key == key), None)
    found = [] if linear is None else [record for record in linear.options if record.desc == option.desc]
    if not found:
        raise MeasurementError(f"the measurement lacks {key} at {option.desc}; measure again")
    return found[0]
