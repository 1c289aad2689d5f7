"""The plots of a report as PNG or SVG files, drawn by matplotlib."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from exlq.errors import ConfigError
from exlq.report.page_source import read_source
from exlq.report.plots import Linear, OptionPoint, Plots, SizePoint, all_plots

KINDS = ("png", "svg")
LABELS = {"exl2": "EXL2", "gguf": "GGUF"}
HUES = ("#0072b2", "#c4520b", "#008a63", "#b0548a", "#b98300", "#2f9fd6", "#5b4bb0", "#6b7480")
ACCENT, MEASURED, SOFT = "#0b6b75", "#b4480f", "#5a6670"
DPI = 160
MAP_VALUES: dict[str, tuple[str, bool, Callable[[OptionPoint], float]]] = {
    "bits": ("bits per weight", False, lambda option: option.bpw),
    "error": ("relative error on held-out rows", True, lambda option: option.err_heldout),
    "loss": ("loss, nats", True, lambda option: option.loss),
}
LEAST = 1e-30  # of what is shown on a log scale


def write_figures(source: Path, directory: Path, kind: str = "png") -> list[Path]:
    """Writes the plots of the page about `source` into `directory`, made if need be; the files.

    Raises:
        ConfigError: if matplotlib is missing, or the directory cannot be one.
        InputError: if there is no finished job.
    """
    figures = [*chain.from_iterable(_figures(plots) for plots in all_plots(read_source(source)))]
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as exc:
        raise ConfigError(f"{directory} is not a directory; give one for the plots") from exc
    return [_saved(figure, directory / f"{name}.{kind}") for name, figure in figures]


def _figures(plots: Plots) -> Iterator[tuple[str, Any]]:
    """Every plot that there is something for, by its name."""
    if plots.frontier:
        yield f"{plots.name}-frontier", _frontier(plots)
    mapped = [linear for linear in plots.linears if linear.layer is not None and linear.chosen is not None]
    for value in MAP_VALUES if mapped else ():
        yield f"{plots.name}-map-{value}", _map(plots, mapped, value)
    if any(linear.options for linear in plots.linears):
        yield f"{plots.name}-errors", _errors(plots)
    if plots.evaluations:
        yield f"{plots.name}-predicted", _predicted(plots)
    if mapped:
        yield f"{plots.name}-heldout", _heldout(plots, mapped)


def _new(title: str, width: float = 8.0, height: float = 4.6) -> tuple[Any, Any]:
    """An empty figure and its axes; no global state of pyplot's is touched."""
    try:
        from matplotlib.figure import Figure
    except ImportError as exc:
        raise ConfigError("plots take matplotlib; run: pip install 'exlq[report]'") from exc
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e8ecef")
    axes.set_axisbelow(True)
    return figure, axes


def _frontier(plots: Plots) -> Any:
    figure, axes = _new(f"{LABELS[plots.name]}: KL divergence by size")
    x = [point.bpw for point in plots.frontier]
    low = [max(point.kl - point.se, point.kl / 3) for point in plots.frontier]
    axes.fill_between(x, low, [p.kl + p.se for p in plots.frontier], color=ACCENT, alpha=0.13, linewidth=0)
    axes.plot(x, [point.kl for point in plots.frontier], color=ACCENT, label="best predicted")
    for point, shape, colour, label in (
        (plots.chosen, "o", ACCENT, "this model, predicted"),
        (plots.measured, "D", MEASURED, "this model, measured"),
    ):
        if point is not None:
            axes.errorbar(
                [point.bpw], [point.kl], yerr=_bars(point), fmt=shape, color=colour, label=label, zorder=3
            )
    axes.set(yscale="log", xlabel="bits per weight", ylabel="KL divergence, nats")
    axes.legend(frameon=False)
    return figure


def _bars(point: SizePoint) -> list[list[float]]:
    return [[min(point.se, point.kl * 2 / 3)], [point.se]]


def _map(plots: Plots, linears: list[Linear], value: str) -> Any:
    label, log, of = MAP_VALUES[value]
    layers = sorted({linear.layer for linear in linears if linear.layer is not None})
    kinds = list(dict.fromkeys(linear.kind for linear in linears))
    grid = [[float("nan")] * len(layers) for _ in kinds]
    for linear in linears:
        assert linear.layer is not None
        assert linear.chosen is not None
        shown = max(of(linear.options[linear.chosen]), LEAST if log else 0.0)
        grid[kinds.index(linear.kind)][layers.index(linear.layer)] = shown
    width = min(20.0, max(5.0, 2.6 + 0.35 * len(layers)))
    figure, axes = _new(f"{LABELS[plots.name]}: {label}", width, 1.4 + 0.38 * len(kinds))
    axes.grid(visible=False)
    image = axes.imshow(grid, cmap="viridis", norm="log" if log else "linear", aspect="auto")
    axes.set(xlabel="layer", yticks=range(len(kinds)), yticklabels=map(_plain, kinds))
    every = max(1, len(layers) // 16)
    axes.set(xticks=range(0, len(layers), every), xticklabels=layers[::every])
    figure.colorbar(image, ax=axes)
    return figure


def _errors(plots: Plots) -> Any:
    figure, axes = _new(f"{LABELS[plots.name]}: error by bits per weight of every linear")
    kinds = list(dict.fromkeys(linear.kind for linear in plots.linears if linear.options))
    named: set[str] = set()
    for linear in plots.linears:
        best = _undominated(linear.options)
        if best:
            colour = HUES[kinds.index(linear.kind) % len(HUES)]
            label = None if linear.kind in named else _plain(linear.kind)
            named.add(linear.kind)
            axes.plot(
                [o.bpw for o in best], [o.err for o in best], color=colour, lw=1, alpha=0.7, label=label
            )
            chosen = () if linear.chosen is None else (linear.options[linear.chosen],)
            dots = [(option.bpw, option.err) for option in chosen if option.err > 0]
            axes.plot([x for x, _ in dots], [y for _, y in dots], "o", color=colour, ms=4)
    axes.set(yscale="log", xlabel="bits per weight", ylabel="relative error")
    axes.legend(frameon=False, ncols=2, fontsize=8)
    return figure


def _plain(name: str) -> str:
    """A name that matplotlib does not take for a formula."""
    return name.replace("$", r"\$")


def _undominated(options: tuple[OptionPoint, ...]) -> list[OptionPoint]:
    """Options that no smaller one beats in error, errors of nothing left out."""
    kept: list[OptionPoint] = []
    for option in sorted(options, key=lambda option: (option.bpw, option.err)):
        if option.err > 0 and (not kept or option.err < kept[-1].err):
            kept.append(option)
    return kept


def _predicted(plots: Plots) -> Any:
    title = f"{LABELS[plots.name]}: KL divergence, predicted and measured"
    points = [(each.predicted, each.measured) for each in plots.evaluations]
    figure, axes = _equal(title, points, ("predicted, nats", "measured, nats"))
    for each in plots.evaluations:
        if each.predicted > 0 and each.measured > 0:
            x = _bars(SizePoint(0, 0, each.predicted, each.predicted_se))
            axes.errorbar(
                [each.predicted], [each.measured], xerr=x, yerr=[[each.measured_se]] * 2, color=ACCENT
            )
    return figure


def _heldout(plots: Plots, linears: list[Linear]) -> Any:
    chosen = [linear.options[linear.chosen] for linear in linears if linear.chosen is not None]
    points = [(option.err, option.err_heldout) for option in chosen]
    title = f"{LABELS[plots.name]}: error of the chosen options"
    return _equal(title, points, ("on calibration rows", "on held-out rows"))[0]


def _equal(title: str, points: list[tuple[float, float]], names: tuple[str, str]) -> tuple[Any, Any]:
    """Points on two log axes of one range, with the line on which both are equal."""
    figure, axes = _new(title, 5.2, 4.8)
    from matplotlib.ticker import LogLocator

    shown = [(x, y) for x, y in points if x > 0 and y > 0]
    ends = [value for point in shown for value in point] or [0.1, 1.0]
    span = (min(ends) / 3, max(ends) * 3)
    axes.plot(span, span, "--", color=SOFT, lw=1)
    axes.plot([x for x, _ in shown], [y for _, y in shown], "o", color=ACCENT, ms=5)
    axes.set(xscale="log", yscale="log", xlim=span, ylim=span, xlabel=names[0], ylabel=names[1])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(LogLocator(subs=(2, 5)))
    return figure, axes


def _saved(figure: Any, path: Path) -> Path:
    """Written beside and renamed, as every file."""
    beside = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        figure.savefig(beside, dpi=DPI)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    return path
