"""Tables of `exlq doctor`, for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rich.console import Group
from rich.table import Table

from exlq.doctor.record import Diagnosis, Tokens
from exlq.report.inspection import printable
from exlq.report.pairs import pairs

MOST_SHARES, LEAST_SHOWN = 8, 0.0005  # that are named; the rest is summed up
WEIGHTS = {3: "results suffer", 2: "results may suffer", 1: "good to know"}


def diagnosis_view(found: Diagnosis) -> Group:
    """What the file holds, what a conversion would take from it, and advice."""
    tables = [pairs(f"{printable(found.file)}", _text(found))]
    if found.tokens is not None:
        tables.append(pairs("For this model", _tokens(found.tokens)))
    tables.append(_advice(found))
    return Group(*tables)


def _text(found: Diagnosis) -> Iterator[tuple[str, str]]:
    yield "columns", ", ".join(f"{printable(name)}: {kind}" for name, kind in found.columns.items())
    yield "read", f"{printable(found.column)} as {found.kind} ({found.reason})"
    looked = f", {found.looked_at:,} looked at (seed {found.seed})" if found.sampled else ""
    yield "rows", f"{found.rows:,}{looked}; {found.empty:,} empty, {found.null:,} without a value"
    yield "text", f"{found.characters:,} characters, {found.words:,} words"
    if found.lengths is not None:
        lengths = found.lengths
        yield (
            "characters of a text",
            f"{lengths.shortest:,} to {lengths.longest:,}, median {lengths.median:,}, "
            f"95 % up to {lengths.p95:,}",
        )
    repeated = found.duplicates
    yield (
        "duplicates",
        f"{repeated.exact:,} exact ({100 * repeated.exact_share:.1f} % of characters), "
        f"{repeated.near:,} near ({100 * repeated.near_share:.1f} %)",
    )
    yield "languages, roughly", _shares(found.languages)
    yield "code, roughly", f"{100 * found.code:.1f} %"
    yield "scripts", _shares(found.scripts)
    yield "special tokens spelled out", _counts(found.special)
    yield "odd texts", _counts(found.odd)


def _tokens(tokens: Tokens) -> Iterator[tuple[str, str]]:
    yield "tokens", f"{tokens.tokens:,}, {tokens.distinct:,} of {tokens.vocabulary:,} kinds"
    yield "unknown tokens", f"{tokens.unknown:,}"
    yield (
        "rows",
        f"{tokens.rows} of {tokens.row_length} tokens ({tokens.rows_wanted} wanted), "
        f"{tokens.heldout} held out",
    )
    yield (
        "tokens for each channel",
        f"{tokens.per_channel:.1f} of the widest linears ({tokens.widest:,} channels), "
        f"{tokens.measured_per_channel:.1f} when measuring",
    )


def _advice(found: Diagnosis) -> Table:
    if not found.advice:
        return pairs("Advice", [("all well", "nothing to change")])
    return pairs("Advice", [(WEIGHTS[advice.weight], printable(advice.text)) for advice in found.advice])


def _shares(shares: Mapping[str, float]) -> str:
    """The largest, in percent, and how much the others make up."""
    named = [item for item in shares.items() if item[1] >= LEAST_SHOWN][:MOST_SHARES]
    told = ", ".join(f"{name} {100 * share:.1f} %" for name, share in named)
    rest = sum(shares.values()) - sum(share for _, share in named)
    return (told + (f", others {100 * rest:.1f} %" if rest >= LEAST_SHOWN else "")) or "none"


def _counts(counts: Mapping[str, int]) -> str:
    named = [f"{printable(name)} {count:,}" for name, count in list(counts.items())[:MOST_SHARES]]
    return ", ".join([*named, *(["…"] if len(counts) > MOST_SHARES else [])]) or "none"
