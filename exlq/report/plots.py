"""What the plots of a report show, as numbers alone: drawn by the page and by matplotlib alike."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from exlq.allocation import frontier, reachable_range, solve
from exlq.errors import MeasurementError
from exlq.measurement import LinearRecord, Measurement, to_items
from exlq.names import FORMATS
from exlq.recipes.prediction import predicted
from exlq.report.page_source import Result, Source

LAYER = re.compile(r"\.(\d+)\.")
PREVIEW_BPW = 4.5  # of the mix shown for a measurement of which nothing was made


class OptionPoint(NamedTuple):
    """One option of one linear: stored bits, bits per weight, errors, loss."""

    desc: str
    bits: int
    bpw: float
    err: float
    err_heldout: float
    loss: float


class SizePoint(NamedTuple):
    """A size and the KL divergence there, with its standard error."""

    bpw: float
    n_bytes: float
    kl: float
    se: float


class Compared(NamedTuple):
    """A conversion's prediction beside what was measured, each with its standard error."""

    name: str
    predicted: float
    predicted_se: float
    measured: float
    measured_se: float


@dataclass(frozen=True)
class Linear:
    """`chosen` indexes `options`, None where the option `desc` was not measured; `layer` is None outside."""

    key: str
    layer: int | None
    kind: str
    numel: int | None
    sensitivity: float | None
    desc: str
    chosen: int | None
    options: tuple[OptionPoint, ...]


@dataclass(frozen=True)
class Plots:
    """One format. Sizes of `frontier` are of the decoder's linears where `result` is false, else of the file.

    `is_kl`: losses are shares of the KL divergence, not errors. `preview_bpw` is the size of the mix in
    `linears` where no model was made. `heldout_gap` is the median excess of the error on held-out rows.
    """

    name: str
    result: bool
    is_kl: bool
    preview_bpw: float | None
    frontier: tuple[SizePoint, ...]
    chosen: SizePoint | None
    measured: SizePoint | None
    linears: tuple[Linear, ...]
    evaluations: tuple[Compared, ...]
    heldout_gap: float | None


def all_plots(source: Source) -> tuple[Plots, ...]:
    """Of every format that was made, or of a measurement alone every one that was measured.

    Raises:
        MeasurementError: if nothing was measured, or the solver refuses the record.
    """
    names = [name for name in FORMATS if name in source.results or not source.results]
    own = {name: _only(source.record, name) for name in names}
    made = tuple(_plots(source, name, own[name]) for name in names if own[name] or name in source.results)
    if not made:
        raise MeasurementError(f"{source.name} holds no measured linear; measure again")
    return made


def _plots(source: Source, name: str, records: Sequence[LinearRecord]) -> Plots:
    result = source.results.get(name)
    decoder = [record for record in records if _layer(record.key) is not None]
    numel = sum(record.numel for record in decoder)
    preview = None if result or not decoder else _preview(decoder, name, numel)
    allocation = result.allocation if result else preview[0] if preview else {}
    linears = _linears(records, allocation)
    is_kl = bool(records) and all(record.sensitivity is not None for record in records)
    return Plots(
        name=name,
        result=result is not None,
        is_kl=is_kl,
        preview_bpw=preview[1] if preview else None,
        frontier=_frontier(source, result, decoder, name, _rest(linears)) if is_kl and decoder else (),
        chosen=_chosen(result),
        measured=_measured(result),
        linears=linears,
        evaluations=_evaluations(source, name),
        heldout_gap=_heldout_gap(linears),
    )


def _only(record: Measurement | None, name: str) -> list[LinearRecord]:
    """The linears that have options of the format, with these alone."""
    kept = [
        replace(linear, options=tuple(o for o in linear.options if o.format == name))
        for linear in (record.linears if record else ())
        if any(o.format == name for o in linear.options)
    ]
    return kept if name == "gguf" else [replace(linear, tie=None) for linear in kept]


def _items(records: Sequence[LinearRecord]) -> list[Any]:
    return to_items(Measurement({}, {}, {}, tuple(records)))


def _preview(decoder: Sequence[LinearRecord], name: str, numel: int) -> tuple[dict[str, str], float]:
    """A good mix at a usual size, and its bits per weight."""
    items = _items(decoder)
    low, _ = reachable_range(items)
    found = solve(items, max(low, int(PREVIEW_BPW * numel)), "lagrange")
    descs = {record.key: record.options[found.choice[record.key]].desc for record in decoder}
    return descs, found.total_bits / numel


def _frontier(
    source: Source, result: Result | None, decoder: Sequence[LinearRecord], name: str, rest_loss: float
) -> tuple[SizePoint, ...]:
    """The best the decoder's linears can do at every size, all else as it was chosen."""
    numel = sum(record.numel for record in decoder)
    rest_bytes = result.n_bytes - result.bpw * numel / 8 if result else 0.0
    points = []
    for bits, loss in frontier(_items(decoder)):
        found = predicted(loss + rest_loss, source.corrects)
        assert found is not None
        kl, se = _short(found.kl), _short(found.se)
        points.append(SizePoint(_short(bits / numel), round(rest_bytes + bits / 8), kl, se))
    return tuple(points)


def _rest(linears: Sequence[Linear]) -> float:
    """Loss of what is outside the decoder's layers and was chosen: head and embedding."""
    outside = [(linear, linear.chosen) for linear in linears if linear.layer is None]
    return sum(linear.options[index].loss for linear, index in outside if index is not None)


def _chosen(result: Result | None) -> SizePoint | None:
    if result is None or result.predicted_kl is None:
        return None
    return SizePoint(result.bpw, result.n_bytes, result.predicted_kl, result.predicted_se or 0.0)


def _measured(result: Result | None) -> SizePoint | None:
    if result is None:
        return None
    return SizePoint(result.bpw, result.n_bytes, result.evaluation["kl_mean"], result.evaluation["kl_se"])


def _linears(records: Sequence[LinearRecord], allocation: Mapping[str, str]) -> tuple[Linear, ...]:
    """Measured linears in model order, then those that were only chosen."""
    measured = {record.key: record for record in records}
    return tuple(
        _linear(key, measured.get(key), allocation.get(key, "")) for key in {**measured, **allocation}
    )


def _linear(key: str, record: LinearRecord | None, desc: str) -> Linear:
    options = tuple(
        OptionPoint(o.desc, o.total_bits, *map(_short, (o.bpw, o.err, o.err_heldout, o.loss)))
        for o in (record.options if record else ())
    )
    index = next((i for i, option in enumerate(options) if option.desc == desc), None)
    numel, sensitivity = (record.numel, record.sensitivity) if record else (None, None)
    return Linear(key, _layer(key), key.rsplit(".", 1)[-1], numel, sensitivity, desc, index, options)


def _layer(key: str) -> int | None:
    found = LAYER.search(key)
    return int(found[1]) if found else None


def _evaluations(source: Source, name: str) -> tuple[Compared, ...]:
    """All conversions of this record in the format, as the record keeps them."""
    kept = source.record.extra.get("evaluations", {}) if source.record else {}
    try:
        return tuple(
            Compared(
                label.removeprefix(f"{name} "),
                float(each["predicted_kl"]),
                float(each["predicted_se"]),
                float(each["measured"]["kl_mean"]),
                float(each["measured"]["kl_se"]),
            )
            for label, each in kept.items()
            if label.startswith(f"{name} ") and each["predicted_kl"] is not None
        )
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise MeasurementError(f"evaluations of the measurement are broken ({exc!r}); remove them") from exc


def _heldout_gap(linears: Sequence[Linear]) -> float | None:
    chosen = [linear.options[linear.chosen] for linear in linears if linear.chosen is not None]
    gaps = [option.err_heldout / option.err - 1 for option in chosen if option.err > 0]
    return statistics.median(gaps) if gaps else None


def _short(value: float) -> float:
    """Six digits, which no plot shows more of."""
    return float(f"{value:.6g}")
