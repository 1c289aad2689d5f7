"""Figures of an evaluation, and tables as they are shown."""

from __future__ import annotations

import io

from rich.console import Console
from rich.table import Table

from exlq.evaluation.divergence import Divergence

FIGURES = Divergence(
    n_tokens=12800,
    n_chunks=50,
    context=512,
    perplexity_base=11.25,
    perplexity=11.5,
    kl_mean=0.0123,
    kl_se=0.0007,
    kl_median=0.0061,
    kl_p99=0.0911,
    top1_agreement=0.9433,
    noise_floor=3e-10,
)


def lines(table: Table) -> dict[str, str]:
    """The second column by the first, as it is shown."""
    rows = [line.split("│")[1:3] for line in shown(table).splitlines() if "│" in line]
    return {name.strip(): value.strip() for name, value in rows}


def shown(table: Table) -> str:
    text = io.StringIO()
    Console(file=text, width=400).print(table)
    return text.getvalue()
