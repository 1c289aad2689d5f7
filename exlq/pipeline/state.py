"""What a job was begun with: inputs by hash, settings, machine; and what of it is another now."""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from exlq import __version__
from exlq.errors import ConfigError
from exlq.files import atomic_write_json, read_json, sha256_file
from exlq.measurement.stored import as_stored
from exlq.numerics.kernels import COMPILED
from exlq.pipeline.config import ConvertConfig
from exlq.pipeline.directory import FORMAT, MARK
from exlq.pipeline.measured import measurement_path
from exlq.pipeline.plan import Plan

VERSION = 2
# Settings that say where things are or how to go about it; the files they name are known by hash.
NO_MATTER = (
    "in_dir",
    "out_dir",
    "calibration",
    "measurement",
    "output_measurement",
    "recipe",
    "gguf_template",
    "compile_full",
    "no_resume",
    "threads",
    "device",
    "clean",
    "allow_other_machine",
    "profile",
    "workers",
)
SAME_BYTES = {  # what must be the same for the same bytes, and what it is in words
    "threads": "{} threads",
    "device": "{}",
    "capability": "instructions {}",
    "torch": "torch {}",
}


@dataclass(frozen=True)
class State:
    """Everything a job's bytes depend on."""

    inputs: Mapping[str, str]  # sha256 in hex
    settings: Mapping[str, Any]
    machine: Mapping[str, Any]

    @classmethod
    def of(cls, plan: Plan) -> State:
        config = plan.config
        settings = {k: v for k, v in config.as_json().items() if k not in NO_MATTER}
        return cls(_inputs(plan), as_stored(settings), machine(config.device))

    def save(self, work: Path) -> None:
        atomic_write_json(work / MARK, {"format": FORMAT, "version": VERSION, **asdict(self)})


def begun(work: Path) -> State | None:
    """What the job in a work directory was begun with; None if there is none to go on with.

    Raises:
        ConfigError: if it is a newer program's.
    """
    try:
        found = read_json(work / MARK)
        kind = found["version"]
        if kind == VERSION:
            return State(dict(found["inputs"]), dict(found["settings"]), dict(found["machine"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not isinstance(kind, int) or kind > VERSION:
        raise ConfigError(
            f"{work / MARK} is of version {kind}, known is {VERSION}: take the newer exlq, or give -nr"
        )
    return None


def changes(old: State, new: State, out_dir: Path) -> tuple[str, ...]:
    """One line for what has changed among the inputs, one for the settings."""
    files = [name for name, sha256 in new.inputs.items() if old.inputs.get(name, sha256) != sha256]
    lines = []
    if files:
        lines.append(
            f"{', '.join(files)} changed since the last run in {out_dir}: nothing made from the old is used"
        )
    settings = [
        f"{name} was {old.settings[name]}, now {value}"
        for name, value in new.settings.items()
        if name in old.settings and old.settings[name] != value
    ]
    if settings:
        lines.append(
            f"{'; '.join(settings)} since the last run in {out_dir}: only what that leaves the same is used"
        )
    return tuple(lines)


def require_same_machine(old: State, new: State, out_dir: Path) -> None:
    """Refuses to go on with threads, a device or a torch that would not give the same bytes.

    Raises:
        ConfigError: naming both.
    """
    unlike = [name for name in SAME_BYTES if old.machine.get(name) != new.machine[name]]
    if unlike:
        was = ", ".join(SAME_BYTES[name].format(old.machine.get(name)) for name in unlike)
        now = ", ".join(SAME_BYTES[name].format(new.machine[name]) for name in unlike)
        raise ConfigError(
            f"{out_dir} was begun with {was}, now it would be {now}: the bytes may differ; give "
            "--threads and --device as then, --allow-other-machine to go on all the same, or -nr"
        )


def machine(device: str = "cpu") -> dict[str, Any]:
    """What the figures depend on beside the inputs."""
    first, kind = device.partition(",")[0], device_kind(device)
    name = torch.cuda.get_device_name(first) if kind == "cuda" else None
    return {
        "exlq": __version__,
        "torch": torch.__version__,
        "numba": version("numba") if COMPILED else None,
        "python": platform.python_version(),
        "processor": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": kind if name is None else f"{kind} ({name})",
    }


def device_kind(device: str) -> str:
    """`cuda` of `cuda:1` and of `cuda:0,cuda:1`: which of them it was makes no difference."""
    return re.split("[:,]", device)[0]


def _inputs(plan: Plan) -> dict[str, str]:
    """Every file that was given, by its name or its flag; in hex."""
    config, model = plan.config, plan.origin["model"]
    measurement = None if config.measurement is None else measurement_path(config.measurement)
    given = {"-m": measurement, "--recipe": config.recipe, "--gguf-template": config.gguf_template}
    return {
        **model["sha256"],
        "the tokenizer": model["tokenizer_sha256"],
        "the text of -c": plan.rows.record.sha256,
        **{f"the file of {flag}": sha256_file(path) for flag, path in given.items() if path is not None},
    }


def fingerprint(config: ConvertConfig, known: Mapping[str, str]) -> str:
    """A hash of the settings, a colon, and one of the inputs' names and contents.

    Args:
        known: sha256 of files in the model's directory, which are not read again.
    """
    given = (config.calibration, config.measurement, config.recipe, config.gguf_template)
    paths = [path if path.is_file() else measurement_path(path) for path in given if path is not None]
    inside = [path for path in sorted(config.in_dir.iterdir()) if path.is_file()]
    inputs = [(path.name, sha256_file(path)) for path in paths]
    inputs += [(path.name, known.get(path.name) or sha256_file(path)) for path in inside]
    return f"{settings_hash(config)}:{_hash(inputs)}"


def settings_hash(config: ConvertConfig) -> str:
    """Of all settings, the places of inputs and results among them, but for the job's directory."""
    left_out = ("threads", "no_resume", "out_dir", "clean", "allow_other_machine", "profile", "workers")
    settings = {k: v for k, v in config.as_json().items() if k not in left_out}
    return _hash([__version__, settings | {"device": device_kind(config.device)}])


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
