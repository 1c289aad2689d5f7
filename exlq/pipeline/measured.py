"""Where a job's measurement comes from: a file given, one begun or finished before, or the measuring pass."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exlq import __version__, measurement
from exlq.errors import MeasurementError
from exlq.measurement import LinearRecord, Measurement
from exlq.pipeline import sensitivity
from exlq.pipeline.measure import measure
from exlq.pipeline.plan import Plan
from exlq.pipeline.progress import Progress
from exlq.pipeline.sensitivity import Sensitivity
from exlq.workspace import Workspace

MEASUREMENT = "measurement.json"
PARTIAL = "measurement.partial.json"
SENSITIVITY = "sensitivity.safetensors"
GRADIENTS = "gradients"  # directory of what the gradient pass has found


def measurement_path(path: Path) -> Path:
    """The file meant by `path`, which may be a directory."""
    return path / MEASUREMENT if path.is_dir() else path


def given(plan: Plan) -> Measurement | None:
    """The measurement of `-m`, if there is one.

    Raises:
        MeasurementError: if it cannot be read, or was taken otherwise and is not forced.
    """
    path = plan.config.measurement
    if path is None:
        return None
    record = measurement.load(measurement_path(path))
    unlike = measurement.differences(record.origin, plan.origin)
    if unlike and not plan.config.force_measurement:
        raise MeasurementError(
            f"{path} was measured otherwise: {'; '.join(unlike)}; measure again, or give --force-measurement"
        )
    return record


def measured(plan: Plan, work: Path, made_with: Mapping[str, Any], progress: Progress) -> Measurement:
    """A whole measurement, going on from what an earlier run of this job has left.

    Args:
        work: holds the files of a measurement that is not finished.
        made_with: what is recorded of program and machine.
    """
    empty = Measurement(**plan.origin, extra={"made_with": made_with})
    finished = empty if plan.config.no_resume else _left(plan, plan.config.out_dir / MEASUREMENT, empty)
    begun = max(finished, _left(plan, work / PARTIAL, empty), key=lambda record: len(record.linears))
    if {linear.key for linear in begun.linears} == set(plan.specs):
        return begun

    def save(record: Measurement) -> None:
        measurement.save(record, work / PARTIAL)

    found = sensitivities(plan, work, progress)
    return measure(plan, found, begun, Workspace(work), save, progress)


def sensitivities(plan: Plan, work: Path, progress: Progress) -> Sensitivity:
    """What the gradient pass finds, from `work` where this job has left it there.

    Where output errors are all that counts, there is no such pass and nothing costs more than the rest.
    """
    if plan.config.objective == "output-error":
        return sensitivity.indifferent(plan.model, work / SENSITIVITY)
    path = _sensitivity_path(plan, work)
    if not path.exists():
        ids = plan.measurement_rows.ids[~plan.measurement_rows.heldout]
        rows = sensitivity.fisher_rows(ids)
        kept = path.with_suffix("")
        kept.mkdir(parents=True, exist_ok=True)
        namer = sensitivity.row_namer(plan.measurement_rows)
        given = plan.model, rows, Workspace(kept), plan.config.seed, path, progress, namer, plan.profile
        with plan.profile.stage("gradients"):
            sensitivity.fisher(*given)
        shutil.rmtree(kept)
    return Sensitivity.load(path)


def _sensitivity_path(plan: Plan, work: Path) -> Path:
    """Named by what it was taken of, for `work` may hold that of a run with other settings."""
    origin = json.dumps(plan.origin, sort_keys=True, default=dict)
    return work / GRADIENTS / f"{hashlib.sha256(origin.encode()).hexdigest()[:16]}-{SENSITIVITY}"


def _left(plan: Plan, path: Path, empty: Measurement) -> Measurement:
    """An earlier measurement of the same origin by the same program, or the empty one."""
    try:
        record = measurement.load(path)
    except MeasurementError:
        return empty
    made_with = record.extra.get("made_with")
    same_program = isinstance(made_with, dict) and made_with.get("exlq") == __version__
    same = same_program and not measurement.differences(record.origin, empty.origin)
    return record if same and all(_covers(plan, linear) for linear in record.linears) else empty


def _covers(plan: Plan, linear: LinearRecord) -> bool:
    """Whether the record has all options that would be tried."""
    spec = plan.specs.get(linear.key)
    descs = {option.desc for option in linear.options}
    return spec is not None and all(o.desc in descs for _, options in plan.tried(spec) for o in options)
