"""What follows from what was found, in sentences."""

from __future__ import annotations

import math
from collections.abc import Iterator

from exlq.calibration.rows import HELDOUT_EVERY
from exlq.calibration.source import KINDS
from exlq.doctor.duplicates import NEAR, RUN
from exlq.doctor.oddities import REPEATED
from exlq.doctor.record import Advice, Diagnosis, Tokens

FEW, PLENTY = 4, 10  # tokens a channel of a Hessian
MANY_REPEATED = (0.01, 0.1)  # shares of the characters: from the first it may matter, from the second it does
MANY_UNKNOWN = (0.001, 0.01)  # of the tokens
MANY_EMPTY = 0.5  # of the rows
ONE_SORT = 0.97  # of the characters; headings and names tell no language
MANY_SPECIAL = 0.01  # of the characters


def advise(found: Diagnosis) -> tuple[Advice, ...]:
    """All advice, the weightiest first; none where nothing is wrong."""
    parts = (_tokens, _repetition, _rows, _special, _odd, _sorts, _sampled)
    return tuple(sorted((advice for part in parts for advice in part(found)), key=lambda a: -a.weight))


def _tokens(found: Diagnosis) -> Iterator[Advice]:
    tokens = found.tokens
    if tokens is None:
        return
    yield from _width(tokens)
    if tokens.rows < tokens.rows_wanted:
        yield Advice(
            "few rows",
            2,
            f"The text fills {tokens.rows} of {tokens.rows_wanted} rows of {tokens.row_length} tokens; "
            "a longer one would be used.",
        )
    share = tokens.unknown / max(1, tokens.tokens)
    if share >= MANY_UNKNOWN[0]:
        yield Advice(
            "unknown tokens",
            3 if share >= MANY_UNKNOWN[1] else 2,
            f"{100 * share:.1f} % of the tokens are the tokenizer's unknown one: this text holds what the "
            "model cannot read. Leave those rows out.",
        )


def _width(tokens: Tokens) -> Iterator[Advice]:
    """Whether the Hessians see enough; one of fewer tokens than channels is singular."""
    kept = 1 - 1 / HELDOUT_EVERY
    wanted = math.ceil(PLENTY * tokens.widest / kept / tokens.row_length)
    remedy = f"-r {wanted} (of {tokens.row_length} tokens) would give {PLENTY}"
    if wanted * tokens.row_length > tokens.tokens:
        remedy = f"{wanted * tokens.row_length:,} tokens of text, with -r {wanted}, would give {PLENTY}"
    seen = (
        f"The Hessian of the widest linears ({tokens.widest:,} channels) sees {tokens.per_channel:.1f} tokens"
    )
    if tokens.per_channel < 1:
        yield Advice(
            "singular Hessian",
            3,
            f"{seen} for each channel. With fewer than 1 it is singular, and what is left to dampening is "
            f"guessed; {remedy}.",
        )
    elif tokens.per_channel < PLENTY:
        weight = 2 if tokens.per_channel < FEW else 1
        yield Advice(
            "few tokens", weight, f"{seen} for each channel; {FEW} to {PLENTY} are advisable. {remedy}."
        )
    if tokens.measured_per_channel < 1 <= tokens.per_channel:
        rows = math.ceil(FEW * tokens.widest / kept / tokens.row_length)
        yield Advice(
            "few tokens measured",
            2,
            f"Measuring sees only {tokens.measured_per_channel:.1f} tokens for each of those channels; "
            f"-mr {rows} would give {FEW}.",
        )


def _repetition(found: Diagnosis) -> Iterator[Advice]:
    repeated = found.duplicates
    rules = (
        ("exact duplicates", repeated.exact, repeated.exact_share, "are the same as earlier ones"),
        (
            "near duplicates",
            repeated.near,
            repeated.near_share,
            f"repeat at least {100 * NEAR:.0f} % of their runs of {RUN} words from earlier ones",
        ),
    )
    for code, count, share, told in rules:
        if share >= MANY_REPEATED[0]:
            yield Advice(
                code,
                3 if share >= MANY_REPEATED[1] else 2,
                f"{count:,} texts ({100 * share:.0f} % of all characters) {told}. They take the place of "
                "other text, and held-out rows may hold what the others do; keep each once.",
            )


def _rows(found: Diagnosis) -> Iterator[Advice]:
    if found.null:
        yield Advice("null rows", 2, f"{found.null:,} rows have no value and are left out.")
    if found.empty >= MANY_EMPTY * max(1, found.looked_at):
        yield Advice(
            "empty rows",
            1,
            f"{found.empty:,} of {found.looked_at:,} rows are empty; in a column of text each becomes "
            "an empty line.",
        )
    others = [name for name in KINDS if name in found.columns and name != found.column]
    if others:
        yield Advice(
            "other columns",
            1,
            f"The file also has {' and '.join(others)}, which {'are' if len(others) > 1 else 'is'} not read; "
            f"{found.column} comes first.",
        )


def _special(found: Diagnosis) -> Iterator[Advice]:
    if not found.special:
        return
    count = sum(found.special.values())
    some = ", ".join(list(found.special)[:3])
    told = f"Special tokens are spelled out {count:,} times ({some})"
    if found.kind == "messages":
        yield Advice("special tokens", 2, f"{told} inside messages, where they break its turns.")
    elif found.parse_special:
        yield Advice("special tokens", 1, f"{told}; with --parse-special each is one token.")
    else:
        spelled = sum(len(name) * times for name, times in found.special.items())
        yield Advice(
            "special tokens",
            2 if spelled >= MANY_SPECIAL * found.characters else 1,
            f"{told} and are read as plain characters. If they mark turns as this model's template does, "
            "--parse-special makes each the one token the model knows; a column messages is safer.",
        )


def _odd(found: Diagnosis) -> Iterator[Advice]:
    meaning = {
        "control characters": "hold control characters, which come from broken extraction",
        "replacement characters": "hold U+FFFD, what is left of characters that were decoded wrongly",
        "invisible characters": "hold zero-width characters or byte order marks",
        "one character repeated": f"repeat one character {REPEATED} times or more",
    }
    for name, count in found.odd.items():
        yield Advice(name, 2, f"{count:,} texts {meaning[name]}; clean or drop them.")


def _sorts(found: Diagnosis) -> Iterator[Advice]:
    """Text of one sort alone."""
    shares = {name: share * (1 - found.code) for name, share in found.languages.items()}
    shares["code"] = found.code
    largest = max(shares, key=lambda name: shares[name])
    if found.characters and shares[largest] >= ONE_SORT:
        yield Advice(
            "one sort of text",
            1,
            f"Nearly all of it is {largest}. Add some of whatever else the model is to be used for: prose, "
            "code, chat, other languages.",
        )


def _sampled(found: Diagnosis) -> Iterator[Advice]:
    if found.sampled:
        yield Advice(
            "sampled",
            1,
            f"The file is large: {found.looked_at:,} of {found.rows:,} rows were looked at, drawn with seed "
            f"{found.seed}; tokens are scaled from them, and there are more duplicates in all.",
        )
