"""What `exlq doctor` shows."""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console

from exlq.doctor.record import Advice, Diagnosis, Duplicates, Lengths, Tokens
from exlq.report.diagnosis import diagnosis_view

FOUND = Diagnosis(
    file="text.parquet",
    columns={"text": "string"},
    column="text",
    kind="text",
    reason="named",
    rows=1000,
    sampled=False,
    looked_at=1000,
    seed=3,
    empty=2,
    null=1,
    characters=123_456,
    words=20_000,
    lengths=Lengths(1, 20, 300, 4000),
    duplicates=Duplicates(5, 0.01, 7, 0.02),
    scripts={"Latin": 0.9999, "Greek": 0.0001},
    languages={"English": 1.0},
    code=0.125,
    special={},
    parse_special=False,
    odd={},
    tokens=None,
    advice=(),
)


def shown(found: Diagnosis) -> str:
    console = Console(width=120)
    with console.capture() as captured:
        console.print(diagnosis_view(found))
    return captured.get()


def test_every_figure_is_shown_and_shares_of_nothing_are_not() -> None:
    text = shown(FOUND)
    for part in (
        "text.parquet",
        "1,000; 2 empty, 1 without",
        "123,456",
        "1 to 4,000",
        "5 exact (1.0 %",
        "12.5 %",
    ):
        assert part in text
    assert "Greek" not in text
    assert "For this model" not in text
    assert "nothing to change" in text


def test_tokens_and_advice_are_shown_where_there_are_any() -> None:
    tokens = Tokens(50_000, 900, 1000, 0, 100, 97, 512, 12, 768, 56.7, 18.7)
    text = shown(replace(FOUND, tokens=tokens, advice=(Advice("few rows", 2, "More text."),), sampled=True))
    for part in (
        "50,000",
        "97 of 512 tokens (100 wanted)",
        "12 held out",
        "56.7",
        "may suffer",
        "More text.",
    ):
        assert part in text
    assert "seed 3" in text
