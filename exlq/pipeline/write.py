"""The EXL2 directory, written as the linears come."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from exlq import __version__
from exlq.formats.exl2_config import exl2_config
from exlq.formats.exl2_directory import Exl2Writer
from exlq.models.config import read_json
from exlq.pipeline import verify
from exlq.pipeline.allocate import Choice
from exlq.pipeline.plan import Plan
from exlq.pipeline.progress import Progress
from exlq.pipeline.quantize import quantized_linears
from exlq.workspace import Workspace

EXLLAMAV2_VERSION = "0.3.2"  # whose form of the directory is written


def write_exl2(
    plan: Plan, choice: Choice, directory: Path, workspace: Workspace, progress: Progress
) -> dict[str, str]:
    """Quantizes the model into `directory`, which exists and is empty.

    Returns:
        The digest of every linear's stored tensors, by key.
    """
    writer = Exl2Writer(directory, plan.config.shard_mib << 20 or None)
    digests = {}
    try:
        for name in plan.model.plain_tensors():
            writer.add_plain(name, plan.model.weights.read(name))
        for spec, tensors in quantized_linears(plan, choice.options, workspace, progress):
            writer.add_linear(spec.key, tensors, plan.model.linear_bias(spec.key))
            digests[spec.key] = verify.digest(tensors)
        writer.close(written_config(plan), plan.config.in_dir)
    except BaseException:
        writer.abandon()
        raise
    return digests


def written_config(plan: Plan) -> dict[str, Any]:
    """config.json of the output.

    Raises:
        ModelError: if ExLlamaV2 could not read it right.
    """
    config, record = plan.config, plan.rows.record
    written = exl2_config(
        read_json(config.in_dir),
        bits=config.bits or 0.0,
        head_bits=config.head_bits,
        rows=record.rows,
        length=record.row_length,
        dataset=record.file if config.calibration else "(default)",
        version=EXLLAMAV2_VERSION,
        architecture=plan.model.family.exl2_architecture or plan.model.family.architectures[0],
    )
    written["quantization_config"]["exlq"] = __version__
    return written
