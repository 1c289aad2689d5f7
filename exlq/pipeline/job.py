"""One conversion from beginning to end: plan, measure, allocate, quantize, verify, put in place."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from exlq import __version__, measurement
from exlq.evaluate.divergence import Divergence
from exlq.files import atomic_write_json
from exlq.measurement import Measurement
from exlq.memory import PeakMemory
from exlq.numerics.scales import COMPILED
from exlq.pipeline import directory, measured, verify
from exlq.pipeline.allocate import Choice, allocate
from exlq.pipeline.config import ConvertConfig
from exlq.pipeline.measured import FISHER, MEASUREMENT, PARTIAL, measurement_path
from exlq.pipeline.plan import Plan, make_plan
from exlq.pipeline.progress import Progress
from exlq.pipeline.write import write_exl2, written_config
from exlq.workspace import Workspace

SUMMARY = "summary.json"


@dataclass
class Job:
    """The state of a running conversion."""

    plan: Plan
    given: Measurement | None
    work: Path
    progress: Progress
    command: str
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def config(self) -> ConvertConfig:
        return self.plan.config

    @property
    def workspace(self) -> Workspace:
        return Workspace(self.work)

    @property
    def target(self) -> Path:
        """Where the EXL2 directory goes."""
        return self.config.compile_full or self.config.out_dir / "exl2"

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - begin


def finished_summary(config: ConvertConfig) -> dict[str, Any] | None:
    """The summary of this very conversion, where it was finished before and its output still stands."""
    if config.no_resume:
        return None
    try:
        summary = json.loads((config.out_dir / SUMMARY).read_text(encoding="utf-8"))
        same = summary["fingerprint"] == fingerprint(config)
        return dict(summary) if same and Path(summary["output"]["directory"]).is_dir() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def begin(config: ConvertConfig, progress: Progress, command: str) -> Job:
    """Plans and checks; the first to write is the work directory.

    Raises:
        InputError: for whatever cannot work.
    """
    plan = make_plan(config)
    written_config(plan)
    target = config.compile_full or config.out_dir / "exl2"
    if config.output_measurement is None:
        directory.require_replaceable(target)
    else:
        directory.require_parent(measurement_path(config.output_measurement), config.out_dir)
    given = measured.given(plan)
    if given is not None:
        allocate(plan, given)
    return Job(plan, given, directory.prepare_work(config.out_dir, config.no_resume), progress, command)


def run(job: Job) -> dict[str, Any] | None:
    """Does the work; the summary, or None where only a measurement was asked for."""
    with PeakMemory() as memory:
        summary = _run(job)
    if summary is not None:
        summary["peak_anonymous_bytes"] = memory.bytes
        atomic_write_json(job.config.out_dir / SUMMARY, summary)
    _clean(job)
    return summary


def _run(job: Job) -> dict[str, Any] | None:
    with job.timed("measuring"):
        record = job.given or measured.measured(job.plan, job.work, machine(), job.progress)
    measurement.save(record, job.config.out_dir / MEASUREMENT)
    if job.config.output_measurement is not None:
        measurement.save(record, measurement_path(job.config.output_measurement))
        return None
    with job.timed("allocating"):
        choice = allocate(job.plan, record)
    finished = job.work / "exl2"
    divergence = _convert(job, choice, finished)
    directory.put_in_place(finished, job.target, job.work)
    evaluation = {"predicted_kl": choice.loss, "measured": asdict(divergence)}
    results = {**record.extra.get("evaluations", {}), _target_name(job.config): evaluation}
    record = replace(record, extra={**record.extra, "evaluations": results})
    measurement.save(record, job.config.out_dir / MEASUREMENT)
    return _summary(job, choice, divergence)


def _convert(job: Job, choice: Choice, finished: Path) -> Divergence:
    """Quantizes into `finished`, re-reads it and compares it with the base."""
    if finished.exists():
        shutil.rmtree(finished)
    finished.mkdir()
    with job.timed("quantizing"):
        digests = write_exl2(job.plan, choice, finished, job.workspace, job.progress)
    with job.timed("verifying"):
        job.progress("verifying", 0, 2)
        verify.verify_files(job.plan.model, finished, digests)
        job.progress("verifying", 1, 2)
        divergence = verify.verify_model(job.plan, finished, job.workspace)
        job.progress("verifying", 2, 2)
    assert job.config.bits is not None
    verify.judge(job.config.bits, choice.loss, divergence.kl_mean)
    return divergence


def _summary(job: Job, choice: Choice, divergence: Divergence) -> dict[str, Any]:
    config, rows = job.config, job.plan.rows.record
    return {
        "fingerprint": fingerprint(config),
        "command": job.command,
        "target": {"bits": config.bits, "head_bits": config.head_bits},
        "result": {
            "bpw": choice.bpw,
            "total_bits": choice.allocation.total_bits,
            "optimality_gap": choice.allocation.gap,
            "predicted_kl": choice.loss,
            "evaluation": asdict(divergence),
            "evaluated_on": job.plan.checked_rows()[1],
        },
        "output": {
            "directory": str(job.target),
            "bytes": _weight_bytes(job.target),
            "base_bytes": _weight_bytes(config.in_dir),
            "measurement": str(config.out_dir / MEASUREMENT),
        },
        "calibration": asdict(rows),
        "allocation": {key: option.desc for key, option in choice.options.items()},
        "seconds": job.seconds,
        "machine": machine(),
        "settings": config.as_json(),
    }


def machine() -> dict[str, Any]:
    """What the figures depend on beside the inputs."""
    return {
        "exlq": __version__,
        "torch": torch.__version__,
        "numba": version("numba") if COMPILED else None,
        "python": platform.python_version(),
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
    }


def fingerprint(config: ConvertConfig) -> str:
    """A hash of the settings and of the inputs' names, sizes and times of change."""
    settings = {k: v for k, v in config.as_json().items() if k not in ("threads", "no_resume", "out_dir")}
    inputs = [config.calibration, config.measurement, *sorted(config.in_dir.iterdir())]
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in inputs if path is not None]
    return hashlib.sha256(json.dumps([__version__, settings, stats], sort_keys=True).encode()).hexdigest()


def _target_name(config: ConvertConfig) -> str:
    return f"exl2 {config.bits} bpw, head {config.head_bits}"


def _weight_bytes(model_dir: Path) -> int:
    patterns = ("*.safetensors", "*.bin", "*.pt", "*.pth")
    return sum(path.stat().st_size for pattern in patterns for path in model_dir.glob(pattern))


def _clean(job: Job) -> None:
    """Removes the large working files; the directory itself tells that the job was ours."""
    for path in (*job.work.glob("*.bin"), job.work / FISHER, job.work / PARTIAL):
        path.unlink(missing_ok=True)
