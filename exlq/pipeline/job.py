"""One conversion from beginning to end: plan, measure, allocate, quantize, verify, put in place."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from exlq import __version__, measurement
from exlq.doctor import diagnose
from exlq.errors import ConfigError, InputError
from exlq.evaluation.divergence import Divergence
from exlq.files import atomic_write_json
from exlq.measurement import Measurement
from exlq.memory import PeakMemory
from exlq.numerics.scales import COMPILED
from exlq.pipeline import directory, measured, verify
from exlq.pipeline.allocate import Choice
from exlq.pipeline.card import CARD, model_card
from exlq.pipeline.config import ConvertConfig
from exlq.pipeline.estimate import require_disk
from exlq.pipeline.measured import MEASUREMENT, PARTIAL, SENSITIVITY, measurement_path
from exlq.pipeline.output import Output
from exlq.pipeline.outputs import make_outputs
from exlq.pipeline.overhead import overhead_bytes
from exlq.pipeline.plan import Plan, make_plan
from exlq.pipeline.progress import Progress
from exlq.recipes.prediction import predicted
from exlq.workspace import Workspace

SUMMARY = "summary.json"
OVERHEAD = "overhead_bytes"  # of the measurement: by format, what its matrices do not take
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


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
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def config(self) -> ConvertConfig:
        return self.plan.config

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
        places = [path for output in summary["outputs"].values() for path in output["paths"]]
        same = summary["fingerprint"] == fingerprint(config)
        return dict(summary) if same and all(Path(path).exists() for path in places) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def begin(config: ConvertConfig, progress: Progress, command: str) -> Job:
    """Plans and checks; the first to write is the work directory.

    Raises:
        InputError: for whatever cannot work.
    """
    plan = make_plan(config)
    outputs, notes = ((), ()) if config.output_measurement else make_outputs(plan)
    for output in outputs:
        output.require_place()
    require_disk(plan, outputs)
    if config.output_measurement is not None:
        directory.require_parent(measurement_path(config.output_measurement), config.out_dir)
    given = measured.given(plan)
    if given is not None:
        for output in outputs:
            output.allocate(given)
    work = directory.prepare_work(config.out_dir, config.no_resume)
    return Job(plan, outputs, notes, given, work, progress, command)


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
        output.name: {"bpw": choice.bpw, **_foretold(config, choice), **output.figures(choice)}
        for output, choice in choices.items()
    }
    return figures, (*notes, *(note for choice in choices.values() for note in choice.notes))


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
    record = job.given
    if record is None and job.config.measures:
        with job.timed("measuring"):
            record = measured.measured(job.plan, job.work, machine(), job.progress)
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
    with job.timed("allocating"):
        choice = output.allocate(record)
    finished = job.work / output.name
    if finished.exists():
        shutil.rmtree(finished)
    finished.mkdir()
    with job.timed("quantizing"):
        output.write(choice, finished, job.work, job.progress)
    with job.timed("verifying"):
        job.progress(f"verifying {output.name}", 0, 1)
        divergence = verify.verify_model(job.plan, output.opened(finished), Workspace(job.work))
        job.progress(f"verifying {output.name}", 1, 1)
    foretold = _foretold(job.config, choice)
    if output.trusted(choice):
        verify.judge(foretold["predicted_kl"], divergence.kl_mean)
    result = {**foretold, **_result(output, choice, divergence)}
    file = min((path.name for path in finished.glob("*.gguf")), default=output.name)
    card = model_card(job.plan, output.name, file, result)
    (finished / CARD).write_text(card, encoding="utf-8", newline="\n")
    paths = [path for path in output.put_in_place(finished, job.work) if path.name != CARD]
    result |= {"paths": [str(path) for path in paths], "bytes": sum(_weight_bytes(path) for path in paths)}
    if record is not None:
        evaluation = {**foretold, "measured": asdict(divergence)}
        evaluations = {**record.extra.get("evaluations", {}), _target_name(job.config, output): evaluation}
        record = replace(record, extra={**record.extra, "evaluations": evaluations})
        measurement.save(record, job.config.out_dir / MEASUREMENT)
    return result, record


def _foretold(config: ConvertConfig, choice: Choice) -> dict[str, float | None]:
    """The expected KL divergence and its standard error, None where nothing was measured."""
    found = predicted(choice.loss, config.corrects)
    if found is None:
        return {"predicted_kl": None, "predicted_se": None}
    return {"predicted_kl": found.kl, "predicted_se": found.se}


def _result(output: Output, choice: Choice, divergence: Divergence) -> dict[str, Any]:
    solution = choice.allocation
    return {
        "bpw": choice.bpw,
        "optimality_gap": None if solution is None else solution.gap,
        "evaluation": asdict(divergence),
        "notes": choice.notes,
        **output.figures(choice),
        "allocation": {key: option.desc for key, option in choice.options.items()},
    }


def _summary(job: Job, results: Mapping[str, Any]) -> dict[str, Any]:
    config = job.config
    record = config.out_dir / MEASUREMENT
    return {
        "fingerprint": fingerprint(config),
        "command": job.command,
        "target": config.targets,
        "outputs": results,
        "notes": job.notes,
        "base_bytes": _weight_bytes(config.in_dir),
        "measurement": str(record) if job.given is not None or config.measures else None,
        "evaluated_on": job.plan.checked_rows()[1],
        "calibration": asdict(job.plan.rows.record),
        "calibration_text": _text_found(config),
        "seconds": job.seconds,
        "machine": machine(),
        "settings": config.as_json(),
    }


def _text_found(config: ConvertConfig) -> dict[str, Any] | None:
    """What `exlq doctor` finds in the text, tokens apart; None where it can say nothing."""
    try:
        found = diagnose(
            config.calibration,
            text_column=config.text_column,
            parse_special=config.parse_special,
            seed=config.seed,
        )
    except InputError:
        return None
    return asdict(found)


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
    given = (config.calibration, config.measurement, config.recipe, config.gguf_template)
    inputs = [*(path for path in given if path is not None), *sorted(config.in_dir.iterdir())]
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in inputs]
    return hashlib.sha256(json.dumps([__version__, settings, stats], sort_keys=True).encode()).hexdigest()


def _target_name(config: ConvertConfig, output: Output) -> str:
    target = " ".join(f"{flag} {value}" for flag, value in config.targets.items())
    return f"{output.name} {target} -hb {config.head_bits}"


def _weight_bytes(path: Path) -> int:
    """Bytes of the weights in a directory, or of a file."""
    if path.is_file():
        return path.stat().st_size if path.suffix == ".gguf" else 0
    return sum(file.stat().st_size for file in path.iterdir() if file.suffix in WEIGHT_SUFFIXES)


def _clean(job: Job) -> None:
    """Removes the large working files; the directory itself tells that the job was ours."""
    for path in (*job.work.glob("*.bin"), *job.work.glob(f"*{SENSITIVITY}"), job.work / PARTIAL):
        path.unlink(missing_ok=True)
