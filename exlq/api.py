"""What the commands do, for Python programs: `from exlq import ConvertConfig, convert`.

Every function raises a subclass of `exlq.errors.ExlqError` whose text is one line; those of `InputError`
mean that the input cannot be used. `progress` is told the stage, the steps done and their number.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from exlq import measurement
from exlq.errors import ConfigError
from exlq.evaluation.run import Evaluation, Settings, evaluate_all
from exlq.formats.exl2_directory import Exl2Weights
from exlq.formats.gguf.dequantized import GgufTensors
from exlq.measurement import Measurement
from exlq.pipeline import job
from exlq.pipeline.config import ConvertConfig
from exlq.pipeline.measured import measurement_path
from exlq.pipeline.progress import Progress, silent

DEFAULT = Settings()


def convert(config: ConvertConfig, progress: Progress = silent) -> dict[str, Any]:
    """A whole conversion, as `exlq convert`; goes on where an interrupted one ended.

    Returns:
        What `OUT/summary.json` holds: for each format, under `outputs`, its paths, bits and figures.
    """
    if config.output_measurement is not None:
        raise ConfigError("output_measurement is set: call measure() for a measurement alone")
    done = job.finished_summary(config)
    if done is None:
        job.run(job.begin(config, progress, "exlq.convert"))
    elif config.clean:
        job.cleaned(config, done)
    return dict(json.loads((config.out_dir / job.SUMMARY).read_text(encoding="utf-8")))


def measure(config: ConvertConfig, progress: Progress = silent) -> Measurement:
    """What every option of every matrix costs, as `exlq convert -om`; written to `config.output_measurement`.

    Without that it goes to `measurement.json` in the job's directory; a target is not looked at.
    """
    path = config.output_measurement or config.out_dir / "measurement.json"
    measuring = replace(config, output_measurement=path, measurement=None, compile_full=None)
    job.run(job.begin(measuring, progress, "exlq.measure"))
    return measurement.load(measurement_path(path))


def load_measurement(path: Path) -> Measurement:
    """A measurement from its file, or from the directory of a job."""
    return measurement.load(measurement_path(path))


def evaluate(
    models: Sequence[Path], base: Path, text: Path, settings: Settings = DEFAULT
) -> list[Evaluation]:
    """Models beside the one they were made of, as `exlq eval`.

    Args:
        models: EXL2 or Hugging Face directories, or GGUF files, of split ones the first.
        text: a parquet file.
    """
    with tempfile.TemporaryDirectory(prefix="exlq-eval-", ignore_cleanup_errors=True) as scratch:
        return evaluate_all(models, base, text, Path(scratch), settings)


def open_exl2(directory: Path) -> Exl2Weights:
    """The dequantized tensors of an EXL2 directory, ours or another tool's, read one at a time."""
    return Exl2Weights(directory)


def open_gguf(path: Path) -> GgufTensors:
    """The dequantized tensors and the metadata of a GGUF file, anyone's, read one at a time."""
    return GgufTensors(path)
