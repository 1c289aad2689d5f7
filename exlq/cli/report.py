"""`exlq report`: a page about a finished job."""

from __future__ import annotations

import argparse

from exlq.cli.screen import Screen
from exlq.report.figures import write_figures
from exlq.report.page import write_report


def run(parsed: argparse.Namespace, screen: Screen) -> None:
    # Figures first: they fail where matplotlib is missing, and then nothing has been written.
    wanted = {kind: folder for kind, folder in (("png", parsed.png), ("svg", parsed.svg)) if folder}
    figures = [path for kind, folder in wanted.items() for path in write_figures(parsed.source, folder, kind)]
    page = write_report(parsed.source, parsed.output)
    lines = [f"report: {page}", *(f"plot: {path}" for path in figures)]
    screen.show("\n".join(lines), {"report": str(page), "plots": [str(path) for path in figures]})
