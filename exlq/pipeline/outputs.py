"""Which formats a job writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from exlq.errors import ConfigError, InputError
from exlq.pipeline.exl2_output import Exl2Output
from exlq.pipeline.gguf_output import GgufOutput
from exlq.pipeline.output import Output
from exlq.pipeline.plan import Plan


def make_outputs(plan: Plan) -> tuple[tuple[Output, ...], tuple[str, ...]]:
    """The outputs, and a line for each format that was left out since it was not asked for by name.

    Raises:
        InputError: if a format asked for, or every format, cannot be made.
    """
    outputs, left_out = [], {}
    for name, make in OUTPUTS.items():
        if plan.config.formats is not None and name not in plan.config.formats:
            continue
        try:
            _require_measured(plan, name)
            outputs.append(make(plan))
        except InputError as exc:
            if plan.config.formats is not None:
                raise
            left_out[name] = exc
    notes = tuple(f"no {name}: {exc}" for name, exc in left_out.items())
    if not outputs:
        raise type(next(iter(left_out.values())))("; ".join(notes))
    return tuple(outputs), notes


def _require_measured(plan: Plan, name: str) -> None:
    config = plan.config
    if config.measures and config.measurement is None and name not in config.measured_formats:
        raise ConfigError(
            f"--measure {','.join(config.measured_formats)} tries no options of {name}; measure it too"
        )


OUTPUTS: Mapping[str, Callable[[Plan], Output]] = {
    "exl2": Exl2Output,
    "gguf": GgufOutput,
}
