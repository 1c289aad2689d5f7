"""`exlq imatrix`: the importance matrix of a model over a text, as llama-imatrix makes it."""

from __future__ import annotations

import argparse

from exlq.cli.screen import Screen
from exlq.pipeline.imatrix import ImatrixConfig, collect


def run(parsed: argparse.Namespace, screen: Screen) -> None:
    config = ImatrixConfig(
        in_dir=parsed.in_dir,
        output=parsed.output,
        calibration=parsed.cal_dataset,
        rows=parsed.dataset_rows,
        length=parsed.length,
        row_mode=parsed.rows,
        text_column=parsed.text_column,
        parse_special=parsed.parse_special,
        seed=parsed.seed,
        device=parsed.device,
    )
    found, n_heldout = collect(config, screen)
    screen.show(
        f"{config.output}: {len(found.entries)} entries from {found.chunk_count} rows of {found.chunk_size} "
        f"tokens of {found.datasets[0]}; {n_heldout} more are held out, as in convert",
        {"path": str(config.output), "entries": len(found.entries), "rows": found.chunk_count},
    )
