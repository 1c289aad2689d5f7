"""The lines of `bench_fidelity`'s tables, in Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scripts.fidelity_bench import Made, Scores

KINDS = {"gguf": ("weights", "file"), "exl2": ("weights",)}  # what is scored of a format


@dataclass(frozen=True)
class Pair:
    """Theirs and ours at one size."""

    label: str
    made: tuple[Made, Made]
    scores: tuple[Scores, Scores]

    def kl(self, text: str, whose: int, kind: int = 0) -> float:
        """Nats per token; `whose` is 0 for theirs and 1 for ours."""
        return self.scores[whose][text][kind].kl_mean


def heading(first: str, theirs: str, kind: str) -> str:
    """The head of a table of pairs, with the rule below it."""
    columns = [first, f"{theirs}, bytes", "ours, bytes"]
    for what in KINDS[kind]:
        columns += [f"{theirs}, {what}", f"ours, {what}", "ratio"]
    for what in ("perplexity", "same top token", "bpw", "s"):
        columns += [f"{theirs}, {what}", f"ours, {what}"]
    return f"| {' | '.join(columns)} |\n|---|{'--:|' * (len(columns) - 1)}"


def line(pair: Pair, text: str) -> str:
    """One pair on one text; perplexity and top token are those of the weights."""
    cells = [pair.label, *(f"{made.bytes:,}" for made in pair.made)]
    for kind in range(len(pair.scores[0][text])):
        theirs, ours = pair.kl(text, 0, kind), pair.kl(text, 1, kind)
        cells += [f"{theirs:.5f}", f"{ours:.5f}", f"{ours / theirs:.2f}"]
    found = [scores[text][0] for scores in pair.scores]
    cells += [f"{one.perplexity:.3f}" for one in found]
    cells += [f"{100 * one.top1_agreement:.2f} %" for one in found]
    cells += [f"{made.bpw:.3f}" for made in pair.made] + [f"{made.seconds:.0f}" for made in pair.made]
    return f"| {' | '.join(cells)} |"


def saved_heading(first: str, text: str) -> str:
    """The head of the table of `saved`."""
    return (
        f"\nAt equal KL of the weights on {text}; ours interpolated by log KL, ~ beyond its sizes\n\n"
        f"| {first} | KL | their bytes | our bytes | saved | bpw saved |\n|---|--:|--:|--:|--:|--:|"
    )


def saved(pairs: Sequence[Pair], text: str) -> list[str]:
    """By pair the bytes that ours would take for their KL; needs ours at two sizes at least."""
    curve = sorted((math.log(pair.kl(text, 1)), pair.made[1].bytes) for pair in pairs)
    lines = []
    for pair in pairs if len(curve) > 1 else ():
        theirs, wanted = pair.made[0], pair.kl(text, 0)
        size = _at(curve, math.log(wanted))
        sign = "" if curve[0][0] <= math.log(wanted) <= curve[-1][0] else "~"
        less = 1 - size / theirs.bytes
        lines.append(
            f"| {pair.label} | {wanted:.5f} | {theirs.bytes:,} | {sign}{size:,.0f} "
            f"| {sign}{100 * less:.1f} % | {sign}{8 * (theirs.bytes - size) / theirs.weights:.3f} |"
        )
    return lines


def _at(curve: Sequence[tuple[float, int]], x: float) -> float:
    """The line through the two neighbouring points, or through the last two."""
    right = next((i for i in range(1, len(curve) - 1) if curve[i][0] >= x), len(curve) - 1)
    (x0, y0), (x1, y1) = curve[right - 1], curve[right]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
