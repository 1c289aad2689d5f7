"""exlq: calibrated mixed-precision quantization of causal language models."""

import os
from importlib import import_module
from typing import Any

# Threads of torch that spin while they wait are several times slower where other programs use the cores.
# The OpenMP runtime reads this when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"

# What `from exlq import …` gives, by the module that has it; __init__.pyi tells type checkers the same.
EXPORTS = {
    "ConvertConfig": "exlq.pipeline.config",
    "Settings": "exlq.evaluation.run",
    "convert": "exlq.api",
    "evaluate": "exlq.api",
    "load_measurement": "exlq.api",
    "measure": "exlq.api",
    "open_exl2": "exlq.api",
    "open_gguf": "exlq.api",
    "solve": "exlq.recipes.solve",
    "Targets": "exlq.recipes.solve",
}


def __getattr__(name: str) -> Any:
    """Loads what is asked for and no more: `import exlq` alone takes no time."""
    if name not in EXPORTS:
        raise AttributeError(f"module 'exlq' has no attribute {name!r}")
    return getattr(import_module(EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *EXPORTS])
