"""Where a job's measurement comes from: a file given, one begun or finished before, or the measuring pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from exlq import __version__, measurement
from exlq.errors import MeasurementError
from exlq.measurement import Measurement
from exlq.pipeline import sensitivity
from exlq.pipeline.measure import measure
from exlq.pipeline.plan import Plan
from exlq.pipeline.progress import Progress
from exlq.workspace import Workspace

MEASUREMENT = "measurement.json"
PARTIAL = "measurement.partial.json"
FISHER = "fisher.safetensors"


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
    finished = empty if plan.config.no_resume else _left(plan.config.out_dir / MEASUREMENT, empty)
    begun = max(finished, _left(work / PARTIAL, empty), key=lambda record: len(record.linears))
    wanted = {*(spec.key for spec in plan.linears), plan.model.head.key, plan.model.embedding_key}
    if {linear.key for linear in begun.linears} == wanted:
        return begun
    if not begun.linears:
        (work / FISHER).unlink(missing_ok=True)
    ids = plan.measurement_rows.ids[~plan.measurement_rows.heldout]
    workspace = Workspace(work)

    def gradients() -> Mapping[str, Tensor]:
        rows = sensitivity.fisher_rows(ids)
        return sensitivity.fisher(plan.model, rows, workspace, plan.config.seed, progress)

    def save(record: Measurement) -> None:
        measurement.save(record, work / PARTIAL)

    return measure(plan, _kept(work / FISHER, gradients), begun, workspace, save, progress)


def _left(path: Path, empty: Measurement) -> Measurement:
    """An earlier measurement of the same origin by the same program, or the empty one."""
    try:
        record = measurement.load(path)
    except MeasurementError:
        return empty
    made_with = record.extra.get("made_with")
    same_program = isinstance(made_with, dict) and made_with.get("exlq") == __version__
    return record if same_program and not measurement.differences(record.origin, empty.origin) else empty


def _kept(path: Path, compute: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    """Tensors from a file, computed and saved where it is missing."""
    if not path.exists():
        part = path.with_suffix(".part")
        save_file(dict(compute()), part)
        part.replace(path)
    return dict(load_file(path))
