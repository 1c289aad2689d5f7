"""`exlq doctor`: what a calibration text is made of."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from exlq.cli.screen import Screen
from exlq.doctor import diagnose
from exlq.report.diagnosis import diagnosis_view


def run(parsed: argparse.Namespace, screen: Screen) -> None:
    found = diagnose(
        parsed.file,
        parsed.model,
        rows=parsed.dataset_rows,
        length=parsed.length,
        text_column=parsed.text_column,
        parse_special=parsed.parse_special,
        seed=parsed.seed,
    )
    if parsed.json:
        print(json.dumps(asdict(found), indent=1))
    else:
        screen.show(diagnosis_view(found), asdict(found))
