"""`exlq plan`: what fits, and what making it takes."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from typing import Any

from exlq.cli.screen import Screen
from exlq.errors import ConfigError
from exlq.report.plans import plan_view
from exlq.sizes import format_bytes, parse_bytes
from exlq.sizing.advice import Advice, advise
from exlq.sizing.fitting import Fit, Room, default_context
from exlq.sizing.shapes import read_shape
from exlq.sizing.work import gemm_rate


def run(parsed: argparse.Namespace, screen: Screen) -> None:
    shape = read_shape(parsed.model)
    memory, told = _memory(parsed.memory)
    if parsed.gflops is not None and not parsed.gflops > 0:
        raise ConfigError(f"--gflops {parsed.gflops}: a number above 0 is wanted")
    rate = gemm_rate() if parsed.gflops is None else parsed.gflops * 1e9
    context = default_context(shape) if parsed.context is None else parsed.context
    advice = advise(shape, Room(memory, context, parsed.cache), rate, parsed.head_bits)
    result = as_json(advice, rate)
    if parsed.json:
        print(json.dumps(result, indent=1))
    else:
        screen.show(plan_view(advice, str(parsed.model), told, rate), result)


def as_json(advice: Advice, rate: float) -> dict[str, Any]:
    """What is shown, for a program; sizes in bytes."""
    shape, room = advice.shape, advice.room
    return {
        "architecture": shape.architecture,
        "weights": shape.numel + shape.embedding.numel * (1 if shape.tied else 2),
        "memory_bytes": room.memory,
        "context": room.context,
        "cache": room.cache,
        "largest": {
            "bits": {name: {"bits": bits, **_fit(fit)} for name, (bits, fit) in advice.bits.items()},
            "gguf_type": None if advice.recipe is None else _fit(advice.recipe),
            "gguf_file_bytes": advice.file_bytes,
        },
        "sizes": [
            {
                "format": row[0].format,
                "choice": row[0].choice,
                "file_bytes": row[0].running.weights,
                "total_bytes": {
                    str(n): fit.running.total for n, fit in zip(advice.contexts, row, strict=True)
                },
            }
            for row in advice.table
        ],
        "gemm_flops": rate,
        "conversion": [{**asdict(cost), "total_s": cost.total_s} for cost in advice.costs],
        "notes": list(advice.notes),
    }


def _fit(fit: Fit) -> dict[str, Any]:
    return {"choice": fit.choice, **asdict(fit.running), "total": fit.running.total}


def _memory(given: str | None) -> tuple[int, str]:
    """Bytes to fit into, and where they are said from."""
    if given is not None:
        return parse_bytes(given), "--memory"
    try:
        found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError) as exc:
        raise ConfigError("this system does not tell its memory; give --memory SIZE, as 16GiB") from exc
    return found, f"this machine's RAM, {format_bytes(found)}; --memory SIZE asks for another"
