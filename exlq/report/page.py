"""The report as one HTML page: what is static is written here, plots and table are drawn by its script."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from exlq import __version__
from exlq.errors import ConfigError
from exlq.files import atomic_write_text
from exlq.report.page_source import Result, Source, read_source
from exlq.report.page_tables import calibration_rows, detail_sections, text_rows
from exlq.report.plots import Plots, all_plots
from exlq.sizes import format_bytes

SCRIPTS = ("base.js", "chart.js", "plots.js", "heatmap.js", "table.js", "page.js")
LABELS = {"exl2": "EXL2", "gguf": "GGUF"}
NO_RESULT = (
    "No model was made of this measurement yet. The map and the table show a good mix at {} bits per weight."
)


def write_report(source: Path, target: Path | None = None) -> Path:
    """Writes the page about a job's directory or a measurement file; where it is now.

    Args:
        target: the page; in the job's directory or beside the measurement if None.

    Raises:
        InputError: if there is no finished job, or the page cannot be put there.
    """
    found = read_source(source)
    target = target or found.page
    if target.is_dir() or not target.parent.is_dir():
        raise ConfigError(f"-o {target}: want the name of a file in a directory that exists")
    atomic_write_text(target, page(found))
    return target


def page(source: Source) -> str:
    """The HTML; whatever a name in the data holds stays text."""
    plots = all_plots(source)
    script = "(() => {\n'use strict';\n" + "\n".join(map(_asset, SCRIPTS)) + "\n})();"
    return Template(_asset("page.html")).substitute(
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        name=escape(source.name),
        subtitle=escape(_subtitle(source)),
        style=_asset("page.css"),
        results=_results(source, plots),
        notes=_notes(source),
        calibration=table(calibration_rows(source)) + _text_table(source),
        details="\n".join(_details(title, rows) for title, rows in detail_sections(source)),
        version=__version__,
        data=embedded(page_data(source, plots)),
        script=script,
    )


def page_data(source: Source, plots: Iterable[Plots]) -> dict[str, Any]:
    """What the page's script draws, and the results in full."""
    return {
        "name": source.name,
        "target": source.target,
        "results": {name: asdict(result) for name, result in source.results.items()},
        "formats": [{**asdict(each), "label": LABELS[each.name]} for each in plots],
    }


def embedded(value: Any) -> str:
    """JSON that no HTML parser sees an end or a comment in."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def table(rows: Iterable[tuple[str, ...]]) -> str:
    """A table of plain text: the first row its head, the first column the names."""
    head, *body = rows
    heads = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    lines = (
        f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>'
        for name, *cells in body
    )
    return (
        f'<div class="scroll"><table class="facts"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _text_table(source: Source) -> str:
    rows = text_rows(source)
    return table(rows) if rows else ""


def _results(source: Source, plots: Iterable[Plots]) -> str:
    cards = "".join(_card(LABELS[name], result, source) for name, result in source.results.items())
    if cards:
        return f'<div class="cards">{cards}</div>'
    mixes = [f"{each.preview_bpw:.2f} ({LABELS[each.name]})" for each in plots if each.preview_bpw]
    return f'<p class="lead">{escape(NO_RESULT.format(" and ".join(mixes)))}</p>'


def _card(label: str, result: Result, source: Source) -> str:
    """The figures of one format."""
    found = result.evaluation
    size = format_bytes(result.n_bytes)
    base = source.summary.get("base_bytes")
    smaller = f"{100 * result.n_bytes / base:.0f} % of the base" if base else f"{result.n_bytes:,} bytes"
    predicted = (
        "not measured" if result.predicted_kl is None else _pm(result.predicted_kl, result.predicted_se)
    )
    rows = [
        ("KL divergence, predicted", predicted),
        ("Perplexity", f"{found['perplexity']:.3f}"),
        ("Perplexity of the base", f"{found['perplexity_base']:.3f}"),
        ("Tokens compared", f"{found['n_tokens']:,.0f}"),
        ("Bytes", f"{result.n_bytes:,}"),
    ]
    if result.file_bpw is not None:
        rows.append(("Bits per weight, all matrices", f"{result.file_bpw:.3f}"))
    if result.optimality_gap is not None:
        rows.append(
            (
                "Gap to the optimum, at most",
                f"{100 * result.optimality_gap:.4f} %" if result.optimality_gap else "0, proven optimal",
            )
        )
    tiles = (
        (f"{result.bpw:.3f}", "bits per weight"),
        (size, smaller),
        (_digits(found["kl_mean"]), f"measured KL divergence, ±\u00a0{_digits(found['kl_se'])} nats"),
        (f"{100 * found['top1_agreement']:.1f} %", "same top token as the base"),
    )
    big = "".join(f"<div><b>{escape(value)}</b><span>{escape(what)}</span></div>" for value, what in tiles)
    lines = "".join(f"<div><dt>{escape(what)}</dt><dd>{escape(value)}</dd></div>" for what, value in rows)
    return f'<article class="card"><h2>{label}</h2><div class="tiles">{big}</div><dl>{lines}</dl></article>'


def _pm(value: float, se: float | None) -> str:
    return _digits(value) if se is None else f"{_digits(value)} ± {_digits(se)}"


def _digits(value: float) -> str:
    """Two significant digits or more, never an exponent a reader must decode above 1e-6."""
    return f"{value:.5f}" if value >= 1e-4 or value == 0 else f"{value:.1e}"


def _notes(source: Source) -> str:
    said = [
        *source.summary.get("notes", ()),
        *(note for made in source.results.values() for note in made.notes),
    ]
    items = "".join(f"<li>{escape(str(note))}</li>" for note in dict.fromkeys(said))
    return f'<ul class="notes" aria-label="Notes">{items}</ul>' if items else ""


def _subtitle(source: Source) -> str:
    model: Mapping[str, Any] = source.record.model if source.record else {}
    parts = (str(model.get("architecture") or ""), source.target)
    return " · ".join(part for part in parts if part)


def _details(title: str, rows: Iterable[tuple[str, ...]]) -> str:
    return f"<details><summary>{escape(title)}</summary>{table(rows)}</details>"


def _asset(name: str) -> str:
    return (resources.files("exlq.report") / "assets" / name).read_text(encoding="utf-8")
