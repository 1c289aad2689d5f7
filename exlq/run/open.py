"""The runtime that goes with a model and a machine."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from exlq.run.engine import Engine, Machine, Tell
from exlq.run.source import Source

GPU = (None, "cuda")  # devices that leave the choice to ExLlamaV2


def open_engine(source: Source, machine: Machine, note: Tell) -> Engine:
    """Loads a model: a GGUF file into llama.cpp, a directory into ExLlamaV2 where it can, else transformers.

    Args:
        source: of `find_source`.
        note: told, before the weights are read, what runs it and what that takes.

    Raises:
        ConfigError: for a flag that this runtime cannot honour, or one that is not installed.
        ModelError: for a model that cannot be used or does not fit.
    """
    return OPENERS[source.kind](source.path, machine, note)


def _gguf(path: Path, machine: Machine, note: Tell) -> Engine:
    engine: Engine = import_module("exlq.run.llamacpp_engine").LlamaCppEngine(path, machine, note)
    return engine


def _directory(path: Path, machine: Machine, note: Tell) -> Engine:
    """Loaded late, as are the others: llama.cpp needs no torch, whose import takes seconds."""
    exllamav2 = import_module("exlq.run.exllamav2_engine")
    is_exl2 = import_module("exlq.formats.exl2_directory").is_exl2
    engine: Engine
    if machine.device in GPU and exllamav2.usable() and is_exl2(path):
        engine = exllamav2.ExLlamaV2Engine(path, machine, note)
    else:
        engine = import_module("exlq.run.torch_engine").TorchEngine(path, machine, note)
    return engine


OPENERS: dict[str, Callable[[Path, Machine, Tell], Engine]] = {"gguf": _gguf, "directory": _directory}
