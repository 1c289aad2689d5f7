"""From a measurement to one option per linear."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from exlq.allocation import solve
from exlq.errors import FormatError, MeasurementError, TargetError
from exlq.formats.codec import Codec
from exlq.measurement import LinearRecord, Measurement, OptionRecord, to_items
from exlq.pipeline.plan import Plan
from exlq.recipes import stored
from exlq.recipes.stored import RecipeOutput
from exlq.types import Allocation, LinearSpec, Option


@dataclass(frozen=True)
class Choice:
    """What every matrix is stored as, and what that is predicted to cost.

    `loss` is in nats per token, over all matrices of the format, None where it was not measured;
    `bpw` is over the decoder's linears alone. Without `allocation` the options were given. `notes` say
    what is not as it was asked for.
    """

    options: Mapping[str, Option]
    bpw: float
    loss: float | None
    allocation: Allocation | None = None
    notes: tuple[str, ...] = ()


def solved(
    plan: Plan, codec: Codec[Any], measurement: Measurement, keys: Collection[str], budget_bits: int
) -> tuple[Allocation, dict[str, Option]]:
    """The least predicted loss of the matrices `keys` within the budget, and the option of each.

    Raises:
        MeasurementError: if the record lacks a matrix or its options, or has one of another size.
    """
    if not keys:
        return Allocation({}, 0, 0.0, 0.0), {}
    chosen = records(plan, codec, measurement, keys)
    allocation = solve(to_items(replace(measurement, linears=tuple(chosen.values()))), budget_bits)
    options = {key: chosen[key].options[index] for key, index in allocation.choice.items()}
    return allocation, {key: Option(found.desc, found.qparams) for key, found in options.items()}


def recipe_output(plan: Plan, codec: Codec[Any]) -> RecipeOutput | None:
    """What `--recipe` has for the format, None without that flag.

    Raises:
        ConfigError: if the file is no recipe.
        TargetError: if it has nothing for the format.
    """
    path = plan.config.recipe
    if path is None:
        return None
    recipe = stored.load(path)
    if codec.name not in recipe.outputs:
        raise TargetError(f"{path} has {', '.join(recipe.outputs)} alone; solve for {codec.name} too")
    return recipe.outputs[codec.name]


def recipe_options(
    plan: Plan, codec: Codec[Any], given: RecipeOutput, keys: Collection[str]
) -> dict[str, Option]:
    """The recipe's options of the matrices `keys`, in their order, checked against the model.

    Raises:
        TargetError: if it lacks a matrix, has one more, or an option that the matrix cannot have.
    """
    if unlike := sorted(set(keys) ^ set(given.options)):
        verb = "lacks" if unlike[0] in keys else "has"
        raise TargetError(
            f"{plan.config.recipe} {verb} {unlike[0]}, {len(unlike)} matrices differ from this model's: "
            "solve from a measurement of this model"
        )
    return {key: _recipe_option(plan, codec, key, given.options[key]) for key in keys}


def _recipe_option(plan: Plan, codec: Codec[Any], key: str, desc: str) -> Option:
    spec = plan.specs[key]
    options = {option.desc: option for option in codec.measured(spec, plan.role(spec))}
    if desc not in options:
        raise TargetError(
            f"{plan.config.recipe}: {key} cannot be {desc!r} in {codec.name}; it can be {', '.join(options)}"
        )
    return options[desc]


def records(
    plan: Plan, codec: Codec[Any], measurement: Measurement, keys: Collection[str]
) -> dict[str, LinearRecord]:
    """The records of the matrices `keys` with the codec's options alone, checked against the model.

    Raises:
        MeasurementError: as `solved`.
    """
    found = {linear.key: linear for linear in measurement.linears if linear.key in keys}
    if missing := sorted(set(keys) - set(found)):
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise MeasurementError(
            f"the measurement lacks {missing[0]}{others}: it is not of this model, measure again"
        )
    own = measurement.only(
        lambda linear: linear.key in keys and any(o.format == codec.name for o in linear.options),
        lambda option: option.format == codec.name,
    )
    if without := sorted(set(keys) - {linear.key for linear in own.linears}):
        raise MeasurementError(
            f"the measurement has no {codec.name} options of {without[0]}: it was taken without that "
            "format, measure again without --measure"
        )
    for linear in own.linears:
        _require_fitting(codec, plan.specs[linear.key], linear)
    return {linear.key: linear if codec.ties else replace(linear, tie=None) for linear in own.linears}


def measured_loss(measurement: Measurement, key: str, option: Option) -> float | None:
    """What the record predicts for one option of one matrix, if it holds that."""
    linears = (linear for linear in measurement.linears if linear.key == key)
    found = [record for linear in linears for record in linear.options if record.desc == option.desc]
    return found[0].loss if found else None


def total_loss(losses: Iterable[float | None]) -> float | None:
    """Their sum, if all are known."""
    known = list(losses)
    return None if None in known else sum(loss for loss in known if loss is not None)


def _require_fitting(codec: Codec[Any], spec: LinearSpec, measured: LinearRecord) -> None:
    """Refuses records of a matrix of another shape, or with sizes that its options do not have."""
    if measured.numel != spec.numel:
        raise MeasurementError(
            f"the measured {spec.key} has {measured.numel} weights, this model's {spec.numel}: "
            "it was taken of another model, measure again"
        )
    for option in measured.options:
        stored = _stored_bits(codec, spec, option)
        if stored != option.total_bits:
            raise MeasurementError(
                f"{spec.key} at {option.desc}: {option.total_bits} bits are recorded, "
                f"{stored} are stored; measure again"
            )


def _stored_bits(codec: Codec[Any], spec: LinearSpec, option: OptionRecord) -> int:
    try:
        return codec.storage_bits(spec, Option(option.desc, option.qparams))
    except FormatError as exc:
        raise MeasurementError(f"{spec.key} at {option.desc}: {exc}; measure again") from exc
