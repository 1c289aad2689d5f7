"""The exception tree.

ExlqError
├── InputError            something a person gave us cannot be used
│   ├── ConfigError       flags or settings that contradict each other
│   ├── ModelError        model directory, config, tokenizer or tensors
│   ├── CalibrationError  calibration or evaluation text
│   ├── MeasurementError  a measurement.json that is broken or of something else
│   └── TargetError       a target no allocation reaches
├── HessianError          a Hessian that cannot be factored
├── WorkerError           workers that are lost and cannot be replaced
├── FormatError           stored tensors that break the rules of their format
└── VerifyError           what was written is not what was meant

A message is one line: what was found, what was wanted, what to do.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class ExlqError(Exception):
    """Root of everything this package raises on purpose."""


class InputError(ExlqError):
    """Something a person gave us cannot be used."""


class ConfigError(InputError):
    """Flags or settings that contradict each other or are out of range."""


class ModelError(InputError):
    """A model directory, config, tokenizer or tensor that cannot be used."""


class CalibrationError(InputError):
    """Calibration or evaluation text that cannot be used."""


class MeasurementError(InputError):
    """A measurement record that is broken, or was taken of something else."""


class TargetError(InputError):
    """A target that no allocation reaches."""


class HessianError(ExlqError):
    """A Hessian that cannot be factored."""


class WorkerError(ExlqError):
    """Workers that are lost and cannot be replaced."""


class FormatError(ExlqError):
    """Stored tensors that break the rules of their format."""


class VerifyError(ExlqError):
    """What was written is not what was meant."""


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Makes a RuntimeError of a panic in a library written in Rust, which is no Exception in Python."""
    try:
        yield
    except (Exception, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as exc:
        raise RuntimeError(f"the library failed: {exc}") from exc
