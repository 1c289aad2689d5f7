"""The rule of duplicates, as laws."""

from __future__ import annotations

import string

from hypothesis import given, settings
from hypothesis import strategies as st

from exlq.doctor.duplicates import NEAR, RUN, WORD, find

WORDS = st.text(string.ascii_lowercase, min_size=1, max_size=6)
TEXTS = st.lists(st.lists(WORDS, min_size=1, max_size=30).map(" ".join), max_size=12)


def by_hand(texts: list[str]) -> tuple[int, int]:
    """Exact and near duplicates with sets of tuples in place of hashes."""
    seen_texts: set[str] = set()
    seen_runs: set[tuple[str, ...]] = set()
    exact = near = 0
    for text in texts:
        words = [word.casefold() for word in WORD.findall(text)]
        runs = [tuple(words[i : i + RUN]) for i in range(len(words) - RUN + 1)]
        if text.strip() in seen_texts:
            exact += 1
        elif runs and sum(run in seen_runs for run in runs) >= NEAR * len(runs):
            near += 1
        seen_texts.add(text.strip())
        seen_runs.update(runs)
    return exact, near


@given(TEXTS, st.lists(st.integers(0, 11), max_size=6))
@settings(deadline=None, max_examples=60)
def test_it_is_the_rule_by_hand(texts: list[str], again: list[int]) -> None:
    texts = (
        texts
        + [texts[i] for i in again if i < len(texts)]
        + [f"{texts[i]} x" for i in again if i < len(texts)]
    )
    found = find(texts)
    assert (found.exact, found.near) == by_hand(texts)


@given(st.lists(WORDS, min_size=RUN, max_size=40))
@settings(deadline=None, max_examples=60)
def test_case_punctuation_and_white_space_hide_no_duplicate(words: list[str]) -> None:
    text = " ".join(words)
    assert find([text, "\n".join(words).upper() + "!"]).near == 1
    assert find([text, f"  {text}\n"]).exact == 1
    assert find([text]).exact == find([text]).near == 0


def test_distinct_texts_are_no_duplicates() -> None:
    texts = [" ".join(f"w{i}x{j}" for j in range(50)) for i in range(50)]
    assert find(texts).near == find(texts).exact == 0
    assert find([]).near == 0


def test_a_text_with_enough_of_its_own_is_no_near_duplicate() -> None:
    words = [f"w{i}" for i in range(108 - 1)]  # 100 runs
    own = [f"n{i}" for i in range(100)]
    for added, near in ((24, 1), (26, 0)):  # 100 of 124, and of 126 runs are known
        assert find([" ".join(words), " ".join(words + own[:added])]).near == near


def test_texts_without_spaces_have_runs_too() -> None:
    text = "今日はとても良い天気ですから散歩に行きましょう"
    assert find([text, text + "。さて"]).near == 1
