"""What a model, a measurement or a job holds, in a second, without torch."""

from __future__ import annotations

from pathlib import Path

from exlq.errors import InputError
from exlq.inspect.exl2 import inspect_exl2, is_exl2
from exlq.inspect.gguf import inspect_gguf
from exlq.inspect.job import inspect_job, is_job
from exlq.inspect.layers import Grid, by_layer
from exlq.inspect.measured import inspect_measurement
from exlq.inspect.model import inspect_model, inspect_safetensors
from exlq.inspect.record import ORDERS, Entry, Inspection, Total, Ways, select

__all__ = ["ORDERS", "Entry", "Grid", "Inspection", "Total", "Ways", "by_layer", "inspect", "select"]

KINDS = "a directory of a model, of EXL2 or of a job, a .gguf, a .safetensors or a measurement.json"


def inspect(path: Path) -> Inspection:
    """What is at `path`: a model or EXL2 directory, a GGUF or safetensors file, a measurement, a job.

    Raises:
        InputError: for anything else, and for what is not whole.
    """
    if path.is_dir():
        return _directory(path)
    if not path.exists():
        raise InputError(f"{path} does not exist; wanted {KINDS}")
    reader = READERS.get(path.suffix)
    if reader is None:
        with path.open("rb") as file:  # a download may have lost its name
            if file.read(4) != b"GGUF":
                raise InputError(f"{path} is nothing that can be looked into; wanted {KINDS}")
        reader = inspect_gguf
    return reader(path)


def _directory(path: Path) -> Inspection:
    if is_job(path):
        return inspect_job(path)
    if not (path / "config.json").is_file():
        raise InputError(f"{path} has neither a config.json nor a summary.json; wanted {KINDS}")
    return inspect_exl2(path) if is_exl2(path) else inspect_model(path)


READERS = {".gguf": inspect_gguf, ".json": inspect_measurement, ".safetensors": inspect_safetensors}
