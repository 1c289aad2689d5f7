"""A small finished job, written as the pipeline writes it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from exlq.measurement import LinearRecord, Measurement, load, save
from exlq.names import FORMATS
from tests.conftest import REPOSITORY

BUNDLED = REPOSITORY / "measurements" / "tiny-llama.json"
EVALUATION = {
    "n_tokens": 8160,
    "n_chunks": 32,
    "context": 512,
    "perplexity_base": 52.02,
    "perplexity": 52.07,
    "kl_mean": 0.0016,
    "kl_se": 0.0001,
    "kl_median": 0.0009,
    "kl_p99": 0.0105,
    "top1_agreement": 0.968,
    "noise_floor": 3e-8,
}


def option_at(linear: LinearRecord, name: str, bpw: float) -> str:
    """The option of a format nearest to a size."""
    own = [option for option in linear.options if option.format == name]
    return min(own, key=lambda option: abs(option.bpw - bpw)).desc


def make_job(folder: Path, formats: tuple[str, ...] = FORMATS, **changed: Any) -> Path:
    """A job of the bundled measurement; `changed` replaces entries of its summary."""
    folder.mkdir(parents=True)
    record = load(BUNDLED)
    outputs = {name: make_output(record, name) for name in formats}
    compared = {"predicted_kl": 0.0011, "predicted_se": 0.0005, "measured": EVALUATION}
    evaluations = {f"{name} -b {bits} -hb 6": compared for name in formats for bits in (3.0, 4.5)}
    save(
        Measurement(
            record.model, record.calibration, record.settings, record.linears, {"evaluations": evaluations}
        ),
        folder / "measurement.json",
    )
    summary = {
        "fingerprint": "88ac3f36",
        "command": "exlq convert -i models/tiny-llama -o out -b 4.5",
        "target": {"-b": 4.5},
        "outputs": outputs,
        "notes": ["a note"],
        "base_bytes": 8397400,
        "measurement": "out/measurement.json",
        "evaluated_on": "rows held out of both passes",
        "calibration": {**record.calibration, "rows": 400},
        "seconds": {"measuring": 29.0, "quantizing": 179.0},
        "machine": {"exlq": "0.1.0", "threads": 1},
        "settings": {"in_dir": "models/tiny-llama", "gptq": True, "methods": {"input_correction": True}},
        "peak_anonymous_bytes": 598687744,
        **changed,
    }
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return folder


def make_output(record: Measurement, name: str) -> dict[str, Any]:
    linears = [linear for linear in record.linears if any(o.format == name for o in linear.options)]
    return {
        "predicted_kl": 0.0011,
        "predicted_se": 0.0005,
        "bpw": 4.4987654321,
        "optimality_gap": 0.0,
        "evaluation": EVALUATION,
        "paths": [f"out/{name}"],
        "bytes": 3273936,
        "notes": [],
        "allocation": {linear.key: option_at(linear, name, 4.5) for linear in linears},
    }


def renamed(job: Path, old: str, new: str) -> Path:
    """The job with a name replaced in both its files."""
    for file in (job / "summary.json", job / "measurement.json"):
        text = file.read_text(encoding="utf-8").replace(json.dumps(old)[1:-1], json.dumps(new)[1:-1])
        file.write_text(text, encoding="utf-8")
    return job


def lone_measurement(folder: Path) -> Path:
    """The bundled measurement in a directory where a page may be written."""
    return Path(shutil.copy(BUNDLED, folder / "measurement.json"))
