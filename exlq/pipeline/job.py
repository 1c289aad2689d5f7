"""One conversion from beginning to end: plan, measure, allocate, quantize, verify, put in place."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from exlq import measurement
from exlq.errors import ConfigError
from exlq.files import atomic_write_json, naming
from exlq.measurement import Measurement
from exlq.memory import PeakMemory
from exlq.numerics.precision import quick_products
from exlq.pipeline import directory, guards, measured, verify
from exlq.pipeline.card import CARD, model_card
from exlq.pipeline.config import ConvertConfig
from exlq.pipeline.lock import Lock
from exlq.pipeline.measured import GRADIENTS, MEASUREMENT, PARTIAL, measurement_path
from exlq.pipeline.output import Output
from exlq.pipeline.outputs import make_outputs
from exlq.pipeline.overhead import overhead_bytes
from exlq.pipeline.plan import Plan, make_plan
from exlq.pipeline.progress import Progress
from exlq.pipeline.remarks import Remarks
from exlq.pipeline.state import (
    State,
    begun,
    changes,
    fingerprint,
    machine,
    require_same_machine,
    settings_hash,
)
from exlq.pipeline.states import RECORD
from exlq.pipeline.summary import figures_of, foretold_kl, target_name, text_found, weight_bytes
from exlq.pipeline.tensor_cache import TENSORS
from exlq.workspace import Workspace

SUMMARY = "summary.json"
OVERHEAD = "overhead_bytes"  # of the measurement: by format, what its matrices do not take
SERVED = (
    PARTIAL,
    RECORD,
    "*.bin",
    "remarks-*.json",
)  # files of the work directory that nothing wants once all is done


@dataclass
class Job:
    """The state of a running conversion."""

    plan: Plan
    outputs: tuple[Output, ...]
    notes: tuple[str, ...]  # which formats were left out, and why
    given: Measurement | None
    work: Path
    progress: Progress
    command: str
    lock: Lock
    changes: tuple[str, ...]  # since the last run in this directory
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def config(self) -> ConvertConfig:
        return self.plan.config

    @contextmanager
    def timed(self, stage: str, output: str = "") -> Iterator[None]:
        with self.plan.profile.stage(f"{stage} {output}".strip()):
            begin = time.perf_counter()
            yield
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - begin


def finished_summary(config: ConvertConfig) -> dict[str, Any] | None:
    """The summary of this very conversion, where it was finished before and its output still stands."""
    if config.no_resume:
        return None
    try:
        summary = json.loads((config.out_dir / SUMMARY).read_text(encoding="utf-8"))
        places = [path for output in summary["outputs"].values() for path in output["paths"]]
        same = str(summary["fingerprint"]).startswith(settings_hash(config))
        same = same and summary["fingerprint"] == fingerprint(config, {})
        return dict(summary) if same and all(Path(path).exists() for path in places) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def cleaned(config: ConvertConfig, summary: dict[str, Any]) -> dict[str, Any]:
    """A finished conversion's summary, once what it keeps for another run is gone."""
    with directory.writable(config.out_dir):
        lock = Lock(config.out_dir)
        try:
            _forget(config.out_dir)
            summary = {**summary, "kept_bytes": 0}
            atomic_write_json(config.out_dir / SUMMARY, summary)
        finally:
            lock.release()
    return summary


def begin(config: ConvertConfig, progress: Progress, command: str) -> Job:
    """Plans and checks; the first to write is the work directory.

    Raises:
        InputError: for whatever cannot work.
    """
    plan = make_plan(config)
    outputs, notes = ((), ()) if config.output_measurement else make_outputs(plan)
    for output in outputs:
        output.require_place()
    guards.require_disk(plan, outputs)
    notes = (*notes, *guards.memory_notes(plan))
    if config.output_measurement is not None:
        directory.require_parent(measurement_path(config.output_measurement), config.out_dir)
    given = measured.given(plan)
    if given is not None:
        for output in outputs:
            output.allocate(given)
    with directory.writable(config.out_dir):
        lock = Lock(config.out_dir)
    try:
        work, changed = _taken_up(plan)
    except BaseException:
        lock.release()
        raise
    watch = guards.DiskWatch.of(progress, plan, outputs)
    return Job(plan, outputs, notes, given, work, watch, command, lock, changed)


def _taken_up(plan: Plan) -> tuple[Path, tuple[str, ...]]:
    """The work directory, and what is not as it was when it was last worked in.

    Raises:
        ConfigError: if it may not be gone on with.
    """
    config, now = plan.config, State.of(plan)
    work = directory.prepare_work(config.out_dir, config.no_resume)
    with directory.writable(config.out_dir):
        directory.sweep_parts(work, *(config.out_dir / name for name in (SUMMARY, MEASUREMENT)))
        changed: tuple[str, ...] = ()
        before = begun(work) if directory.holds_work(work) else None
        if before is not None:
            changed = changes(before, now, config.out_dir)
            if not config.allow_other_machine:
                require_same_machine(before, now, config.out_dir)
        now.save(work)
    return work, changed


def rehearse(config: ConvertConfig) -> tuple[dict[str, dict[str, Any]], tuple[str, ...]]:
    """What each format's figures would be, from the target and a given measurement, without work; notes.

    Raises:
        InputError: for whatever cannot work, a target that wants a measurement that is not given among it.
    """
    plan = make_plan(config)
    outputs, notes = make_outputs(plan)
    given = measured.given(plan)
    if given is None and config.measures:
        raise ConfigError("--dry-run does not measure: give -m FILE, or --gguf-type NAME as the target")
    choices = {output: output.allocate(given) for output in outputs}
    figures = {
        output.name: {"bpw": choice.bpw, **foretold_kl(config, choice), **output.figures(choice)}
        for output, choice in choices.items()
    }
    return figures, (*notes, *(note for choice in choices.values() for note in choice.notes))


@quick_products()
def run(job: Job) -> dict[str, Any] | None:
    """Does the work; the summary, or None where only a measurement was asked for."""
    out_dir = job.config.out_dir
    try:
        with PeakMemory() as memory, naming(out_dir), job.plan.workers:
            summary = _run(job)
        found = job.plan.profile.found()
        directory.tidy(job.work, (*SERVED, *(output.name for output in job.outputs)))
        keeps = summary is not None and not job.config.clean
        if summary is not None:
            summary["peak_anonymous_bytes"] = memory.bytes
            summary["kept_bytes"] = guards.held_bytes(job.work) if keeps else 0
            if found is not None:
                summary["profile"] = found.as_json()
            atomic_write_json(out_dir / SUMMARY, summary)
        if not keeps:
            _forget(out_dir)
    finally:
        job.lock.release()
    return summary


def _forget(out_dir: Path) -> None:
    """Removes what is kept for another run, and what --no-resume has put aside."""
    directory.tidy(out_dir / "work", (*SERVED, TENSORS, GRADIENTS))
    for path in directory.old_work(out_dir):
        directory.discard(path)


def _run(job: Job) -> dict[str, Any] | None:
    record = job.given
    if record is None and job.config.measures:
        with job.timed("measuring"):
            record = measured.measured(job.plan, job.work, machine(job.config.device), job.progress)
            record = replace(record, extra={**record.extra, OVERHEAD: overhead_bytes(job.plan)})
    if record is not None:
        measurement.save(record, job.config.out_dir / MEASUREMENT)
    if job.config.output_measurement is not None:
        assert record is not None
        measurement.save(record, measurement_path(job.config.output_measurement))
        return None
    results = {}
    for output in job.outputs:
        results[output.name], record = _made(job, output, record)
    return _summary(job, results)


def _made(job: Job, output: Output, record: Measurement | None) -> tuple[dict[str, Any], Measurement | None]:
    """One format made, checked and put in place: its part of the summary, the record with its figures."""
    with job.timed("allocating", output.name):
        choice = output.allocate(record)
    finished = job.work / output.name
    if finished.exists():
        shutil.rmtree(finished)
    finished.mkdir()
    with job.timed("quantizing", output.name):
        output.write(choice, finished, job.work, job.progress)
    with job.timed("verifying", output.name):
        job.progress(f"verifying {output.name}", 0, 1)
        divergence = verify.verify_model(job.plan, output.opened(finished), Workspace(job.work))
        job.progress(f"verifying {output.name}", 1, 1)
    foretold = foretold_kl(job.config, choice)
    trusted, size = output.trusted(choice), job.plan.model.vocab_size
    verify.judge(foretold["predicted_kl"], divergence.kl_mean, trusted, size)
    result = {**foretold, **figures_of(output, choice, divergence, Remarks(job.work, output.name).lines())}
    file = min((path.name for path in finished.glob("*.gguf")), default=output.name)
    card = model_card(job.plan, output.name, file, result)
    (finished / CARD).write_text(card, encoding="utf-8", newline="\n")
    paths = [path for path in output.put_in_place(finished) if path.name != CARD]
    result |= {"paths": [str(path) for path in paths], "bytes": sum(weight_bytes(path) for path in paths)}
    if record is not None:
        evaluation = {**foretold, "measured": asdict(divergence)}
        evaluations = {**record.extra.get("evaluations", {}), target_name(job.config, output): evaluation}
        record = replace(record, extra={**record.extra, "evaluations": evaluations})
        measurement.save(record, job.config.out_dir / MEASUREMENT)
    return result, record


def _summary(job: Job, results: Mapping[str, Any]) -> dict[str, Any]:
    config = job.config
    record = config.out_dir / MEASUREMENT
    return {
        "fingerprint": fingerprint(config, job.plan.origin["model"]["sha256"]),
        "command": job.command,
        "target": config.targets,
        "outputs": results,
        "notes": job.notes,
        "base_bytes": weight_bytes(config.in_dir),
        "measurement": str(record) if job.given is not None or config.measures else None,
        "evaluated_on": job.plan.checked_rows()[1],
        "calibration": asdict(job.plan.rows.record),
        "calibration_text": text_found(config),
        "seconds": job.seconds,
        "machine": machine(config.device),
        "settings": config.as_json(),
    }
