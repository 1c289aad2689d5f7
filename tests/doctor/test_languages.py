"""Languages and code by the labels of the bundled text."""

from __future__ import annotations

import unicodedata

import pyarrow.parquet as pq
import pytest

from exlq.default_calibration import default_calibration
from exlq.doctor.languages import NAMES, SCRIPTS, language_of, looks_like_code, mix, script_counts

NAMED = {"de": "German", "fr": "French", "es": "Spanish", "it": "Italian", "nl": "Dutch", "pl": "Polish"}
NAMED |= {"pt": "Portuguese", "pt_BR": "Portuguese", "sv": "Swedish", "da": "Danish", "cs": "Czech"}
NAMED |= {
    "fi": "Finnish",
    "hu": "Hungarian",
    "tr": "Turkish",
    "ro": "Romanian",
    "el": "Greek",
    "en": "English",
}
NAMED |= {"ru": "Russian", "uk": "Ukrainian", "ja": "Japanese", "ko": "Korean", "zh_CN": "Chinese"}


@pytest.fixture(scope="module")
def labelled() -> list[tuple[str, str, str]]:
    """Text, kind and language of the bundled rows."""
    table = pq.read_table(default_calibration(), columns=["text", "kind", "language"]).to_pydict()
    return list(zip(table["text"], table["kind"], table["language"], strict=True))


def test_languages_are_told_apart(labelled: list[tuple[str, str, str]]) -> None:
    wanted = [
        (text, NAMED[name]) for text, kind, name in labelled if kind == "multilingual" and name in NAMED
    ]
    right = sum(language_of(text, script_counts(text)) == name for text, name in wanted)
    assert right / len(wanted) > 0.95, f"{right} of {len(wanted)}"


def test_code_is_told_from_prose(labelled: list[tuple[str, str, str]]) -> None:
    for kind, wanted in (("code", 0.9), ("prose", 0.0), ("multilingual", 0.0)):
        texts = [text for text, found, _ in labelled if found == kind]
        share = sum(map(looks_like_code, texts)) / len(texts)
        assert abs(share - wanted) <= 0.1 if wanted else share <= 0.01, f"{kind}: {share:.0%}"


def test_scripts_are_those_of_unicode() -> None:
    for first, last, name in SCRIPTS:
        for point in (first, last):
            known = unicodedata.name(chr(point), "")
            prefix = {"Han": ("CJK",), "Kana": ("HIRAGANA", "KATAKANA")}.get(name, (name.upper(),))
            assert not known or known.startswith(prefix), f"{point:x} {known}"
    counted = dict(zip(NAMES, script_counts("abc ÄÖ, яж 漢字 かな 123!?\ud800").tolist(), strict=True))
    assert {name: n for name, n in counted.items() if n} == {"Latin": 5, "Cyrillic": 2, "Han": 2, "Kana": 2}


def test_shares_add_up(labelled: list[tuple[str, str, str]]) -> None:
    found = mix([text for text, _, _ in labelled])
    assert sum(found.languages.values()) == pytest.approx(1)
    assert sum(found.scripts.values()) == pytest.approx(1)
    assert mix([]).code == 0
