"""What is found in a calibration text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Advice:
    """A sentence or two; `weight` is 3 where results suffer, 2 where they may, 1 is good to know."""

    code: str
    weight: int
    text: str


@dataclass(frozen=True)
class Lengths:
    """Characters of the texts that hold something."""

    shortest: int
    median: int
    p95: int
    longest: int


@dataclass(frozen=True)
class Duplicates:
    """How many texts repeat earlier ones: `exact` to the letter, `near` for most of their word runs.

    The shares are of all characters; see `duplicates.find` for the rules.
    """

    exact: int
    exact_share: float
    near: int
    near_share: float


@dataclass(frozen=True)
class Tokens:
    """What a conversion of a model would take from the file.

    `tokens` is exact unless only a sample was looked at. `rows` of `row_length` are given to -r and -l,
    `heldout` of them to no Hessian; `widest` is the largest in_features of the decoder's linears and
    `per_channel` the tokens a Hessian of it sees for each channel, `measured_per_channel` when measuring.
    """

    tokens: int
    distinct: int
    vocabulary: int
    unknown: int
    rows_wanted: int
    rows: int
    row_length: int
    heldout: int
    widest: int
    per_channel: float
    measured_per_channel: float


@dataclass(frozen=True)
class Diagnosis:
    """Everything that `exlq doctor` says; ready for JSON by `dataclasses.asdict`.

    `columns` maps the file's columns to their types, `column` is the one read and `reason` why. `looked_at`
    rows make up the sample, drawn with `seed`, that all else comes from; it is the whole file where
    `sampled` is false. Of them `empty` hold white space alone or nothing and `null` have no value.
    `languages` are shares of characters outside code, `scripts` of letters, `code` of characters. `special`
    counts special tokens that are spelled out, `odd` texts by what is odd in them.
    """

    file: str
    columns: Mapping[str, str]
    column: str
    kind: str
    reason: str
    rows: int
    sampled: bool
    looked_at: int
    seed: int
    empty: int
    null: int
    characters: int
    words: int
    lengths: Lengths | None
    duplicates: Duplicates
    scripts: Mapping[str, float]
    languages: Mapping[str, float]
    code: float
    special: Mapping[str, int]
    parse_special: bool
    odd: Mapping[str, int]
    tokens: Tokens | None
    advice: tuple[Advice, ...]
