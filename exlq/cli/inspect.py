"""`exlq inspect`: what a model, a measurement or a job holds."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from exlq.cli.screen import Screen
from exlq.inspect import Grid, Inspection, by_layer, inspect, select
from exlq.report.inspection import inspection_view


def run(parsed: argparse.Namespace, screen: Screen) -> None:
    found = select(inspect(parsed.path), parsed.filter, parsed.type, parsed.sort)
    grid = by_layer(found) if parsed.by_layer else None
    result = as_json(found, grid, parsed.metadata)
    if parsed.json:
        print(json.dumps(result, indent=1, default=str))
    else:
        screen.show(inspection_view(found, grid, parsed.metadata), result)


def as_json(found: Inspection, grid: Grid | None, metadata: bool) -> dict[str, Any]:
    """What is shown, for a program; figures that there are none of are left out."""
    entries = [{k: v for k, v in asdict(entry).items() if v is not None} for entry in found.entries]
    return {
        "path": found.path,
        "kind": found.kind,
        "facts": dict(found.facts),
        "totals": [asdict(total) for total in found.totals],
        "entries": entries,
        "notes": list(found.notes),
        **({} if grid is None else {"by_layer": asdict(grid)}),
        **({"metadata": dict(found.metadata)} if metadata else {}),
    }
