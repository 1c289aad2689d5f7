"""Freezes what the committed measurement solves to, after a new one: python -m tests.freeze_allocations

Only its EXL2 options are solved over.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from exlq import measurement
from exlq.allocation import solve
from exlq.files import atomic_write_json
from exlq.measurement import to_items

ROOT = Path(__file__).resolve().parent.parent
MEASUREMENT = ROOT / "measurements" / "tiny-llama.json"
FROZEN = ROOT / "tests" / "assets" / "tiny-llama-allocations.json"
TARGETS = (2.5, 3.0, 4.0, 5.0, 6.0)


def solved(target: float) -> dict[str, Any]:
    """The decoder's allocation at `target` bits per weight, as it is frozen."""
    record = measurement.load(MEASUREMENT)
    decoder = record.only(
        lambda linear: linear.key.startswith("model.layers."), lambda option: option.format == "exl2"
    )
    numel = sum(linear.numel for linear in decoder.linears)
    found = solve(to_items(decoder), int(target * numel))
    chosen = {linear.key: linear.options[found.choice[linear.key]].desc for linear in decoder.linears}
    return {"target": target, "bpw": found.total_bits / numel, "loss": found.loss, "options": chosen}


if __name__ == "__main__":
    atomic_write_json(FROZEN, [solved(target) for target in TARGETS])
