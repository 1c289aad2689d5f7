"""A conversion on a GPU, beside exllamav2's own of the same model with as many tokens of the same text."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from exlq.default_calibration import default_calibration
from exlq.names import FORMATS
from exlq.pipeline.kinds import ELSEWHERE
from scripts.scale_run import Run, run, settings
from scripts.scale_tables import WORK_HEADS, stage_rows, table

FEWEST_TIMES = 5.0  # faster than exllamav2


def beside_exllamav2(model: Path, blocks: int, tokens: int, length: int, device: str) -> str:
    """Both formats measured and quantized with head and all blocks; then exllamav2, where it is installed."""
    with tempfile.TemporaryDirectory(prefix="exlq-bench-") as work:
        config = settings(model, Path(work, "out"), tokens, length, device)
        ours = run(config, Path(work), blocks + 1, FORMATS)  # a step more than blocks: the head too
    lines = [_ours(ours, blocks, tokens)]
    if importlib.util.find_spec("exllamav2") is None:
        return "\n".join([*lines, "\nexllamav2 is not installed here: the comparison with it was not run."])
    with tempfile.TemporaryDirectory(prefix="exlq-bench-") as work:
        theirs_s = exllamav2_seconds(model, Path(work), tokens // length, length)
    if theirs_s is None:
        return "\n".join(
            [*lines, "\nexllamav2's conversion did not finish: there is nothing to compare with."]
        )
    ours_s = _seconds(ours)
    return "\n".join(
        [
            *lines,
            f"\nexllamav2's conversion to 4 bits, EXL2 alone: {theirs_s:,.0f} s. Ours of both formats: "
            f"{ours_s:,.0f} s, {theirs_s / ours_s:.1f} × as fast (at least {FEWEST_TIMES:.0f}).",
        ]
    )


def exllamav2_seconds(model: Path, work: Path, rows: int, length: int) -> float | None:
    """Wall time of exllamav2's own conversion, its start included; None where it does not finish."""
    counts = ["-r", str(rows), "-l", str(length), "-mr", str(rows), "-ml", str(length)]
    places = ["-i", str(model), "-o", str(work), "-c", str(default_calibration()), "-nr"]
    begin = time.perf_counter()
    command = [sys.executable, "-m", "exllamav2.conversion.convert_exl2", *places, "-b", "4.0", *counts]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
    seconds = time.perf_counter() - begin
    record = work / "job_new.json"
    finished = record.exists() and json.loads(record.read_text())["progress"] == "finished"
    return seconds if done.returncode == 0 and finished else None


def _seconds(run: Run) -> float:
    return sum(stage.whole.seconds for stage in run.profiled.stages if stage.name != ELSEWHERE)


def _ours(run: Run, blocks: int, tokens: int) -> str:
    rows = [row for stage in run.profiled.stages if stage.name in run.tokens for row in stage_rows(stage)]
    peaks = max(stage.peak_device_bytes or 0 for stage in run.profiled.stages)
    title = f"\n### On {run.profiled.device}: a 7B shape, {blocks} blocks, {tokens:,} tokens in each pass\n"
    return "\n".join([title, table(WORK_HEADS, rows), f"\nPeak memory of the GPU: {peaks / 1e9:.1f} GB."])
