"""Which languages and how much code: roughly, by scripts, frequent words and the look of lines."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

WORDS_LOOKED_AT = 2000  # of a text
LEAST_SHARE = 0.08  # of a text's words that must be frequent ones of a language
CODE_LINES = 0.25  # of a text's lines that must look like code
MOST_LINES, LINE_CHARACTERS = 200, 400  # of a text that are looked at, and of a line

# First and last code points of the letters of a script; Unicode's blocks, without their signs.
SCRIPTS: tuple[tuple[int, int, str], ...] = (
    (0x41, 0x5A, "Latin"),
    (0x61, 0x7A, "Latin"),
    (0xC0, 0xD6, "Latin"),
    (0xD8, 0xF6, "Latin"),
    (0xF8, 0x24F, "Latin"),
    (0x370, 0x3FF, "Greek"),
    (0x400, 0x52F, "Cyrillic"),
    (0x531, 0x587, "Armenian"),
    (0x5D0, 0x5EA, "Hebrew"),
    (0x620, 0x6FF, "Arabic"),
    (0x900, 0x97F, "Devanagari"),
    (0x980, 0x9FF, "Bengali"),
    (0xB80, 0xBFF, "Tamil"),
    (0xE01, 0xE4E, "Thai"),
    (0x10A0, 0x10FF, "Georgian"),
    (0x1E00, 0x1EFF, "Latin"),
    (0x1F00, 0x1FFF, "Greek"),
    (0x3041, 0x30FF, "Kana"),
    (0x3400, 0x9FFF, "Han"),
    (0xAC00, 0xD7A3, "Hangul"),
    (0x20000, 0x323AF, "Han"),
)
NAMES = tuple(dict.fromkeys(name for _, _, name in SCRIPTS))
# A script in which one language is by far the most written; others are named after the script.
OF_SCRIPT = {"Greek": "Greek", "Hangul": "Korean", "Kana": "Japanese", "Han": "Chinese"}
FREQUENT: dict[str, frozenset[str]] = {
    language: frozenset(words.split())
    for language, words in {
        "English": "the of and to in is that it was for with as his he be this are not by from but",
        "German": "der die und das den von zu mit sich des ist nicht auf ein eine im dem auch als wird für",
        "French": "le la les des et est une dans que qui pour pas sur au avec ce il sont plus du être cette",
        "Spanish": "el la los las de que y en un una por con para es se del al lo como más pero su esta",
        "Portuguese": "o os as de que e do da em um uma para com não se dos por mais ao na como são você",
        "Italian": "il la che di e un una per non con del della sono si in è gli le dei nel come anche",
        "Dutch": "de het een van en in is dat op te zijn met voor niet aan er om ook als bij wordt deze",
        "Swedish": "och att det som en på är av för med den till inte om ett har de kan från eller så",
        "Danish": "og at det som en på er af for med den til ikke om et har de kan fra eller så der",
        "Polish": "i w na z do się że nie jest to jak po o dla przez od ale są tym może być oraz",
        "Czech": "a v na se je že to s z do o i k pro jako ale by který nebo jsou při není",
        "Hungarian": "a az és hogy nem egy is ez ha meg vagy csak már mint de volt még lehet kell amely",
        "Finnish": "ja on ei se että oli hän mutta ovat kun niin myös joka tai voi sen jos kuin olla ole",
        "Turkish": "ve bir bu için ile da de olarak olan gibi daha çok ne ya değil her kadar sonra veya en",
        "Romanian": "și de în a la cu pe nu o un este care din să pentru mai ce sau sunt prin fi",
        "Russian": "и в не на что с он как это по но из у за от к для так же все или было",
        "Ukrainian": "і в не на що з він як це по але із у за від до для так та й або було є",
    }.items()
}
CODE = re.compile(
    r"(?:(?:def|class|func|fn|impl|struct|enum)\s+\w.*[:({]|(?:from\s+[\w.]+\s+)?import\s+[\w.{*\"']+"
    r"|#\s*(?:include|define|ifdef|ifndef|endif|pragma)\b|(?:if|for|while|switch|elif)\s*\(.*[{;)]\s*$"
    r"|(?:const|let|var|static|public|private|return|package|using|namespace)\b.*[;{=(]|@\w+|//|/\*|\*/"
    r"|(?:if|for|while|with|elif|else|try|except)\b.*:\s*$|[\w.\[\]>*-]+\s*(?:[-+*/|&]?=|:=)\s*\S.*"
    r"|[})\]]+[;,)]*\s*$|.*[;{]\s*$|[\w.]+\(.*\)\s*$|(?:fi|done|esac|then)$)"
)


class Mix(NamedTuple):
    """Shares: `scripts` of letters, `languages` of characters outside code, `code` of all characters."""

    scripts: Mapping[str, float]
    languages: Mapping[str, float]
    code: float


def mix(texts: Sequence[str]) -> Mix:
    """The rough mix; a text counts as a whole as code or as one language."""
    letters = np.zeros(len(NAMES), np.int64)
    languages: Counter[str] = Counter()
    code = 0
    for text in texts:
        counted = script_counts(text)
        letters += counted
        if looks_like_code(text):
            code += len(text)
        else:
            languages[language_of(text, counted)] += len(text)
    scripts = Counter({name: int(n) for name, n in zip(NAMES, letters, strict=True) if n})
    whole = code + languages.total()
    return Mix(_shares(scripts), _shares(languages), code / whole if whole else 0.0)


def script_counts(text: str) -> NDArray[np.int64]:
    """(scripts,) letters of each of `NAMES`."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    ranges = np.searchsorted(_FIRSTS, points, side="right") - 1
    inside = (ranges >= 0) & (points <= _LASTS[ranges])
    return np.bincount(_INDEX[ranges[inside]], minlength=len(NAMES)).astype(np.int64)


def language_of(text: str, counted: NDArray[np.int64]) -> str:
    """By script, or among those that share one by frequent words; `other` where neither tells."""
    letters = dict(zip(NAMES, counted.tolist(), strict=True))
    if 10 * letters["Kana"] > letters["Kana"] + letters["Han"] > letters["Latin"]:
        return "Japanese"  # written with Han too
    script = max(letters, key=lambda name: letters[name])
    if not letters[script]:
        return "other"
    if script not in ("Latin", "Cyrillic"):
        return OF_SCRIPT.get(script, f"in {script} letters")
    words = Counter(re.findall(r"[^\W\d_]+", text.casefold())[:WORDS_LOOKED_AT])
    hits = {name: sum(words[word] for word in frequent) for name, frequent in FREQUENT.items()}
    best = max(hits, key=lambda name: hits[name])
    return best if hits[best] >= max(1, LEAST_SHARE * words.total()) else f"other in {script} letters"


def looks_like_code(text: str) -> bool:
    """Whether many of its lines do: keywords at their beginning, assignments, calls, braces, semicolons."""
    lines = [line.strip()[:LINE_CHARACTERS] for line in text.splitlines() if line.strip()][:MOST_LINES]
    if len(lines) < 2:
        return False
    return sum(CODE.match(line) is not None for line in lines) >= max(2, CODE_LINES * len(lines))


def _shares(counted: Counter[str]) -> dict[str, float]:
    """Shares of one, largest first."""
    whole = counted.total()
    return {name: n / whole for name, n in counted.most_common()}


_FIRSTS = np.array([first for first, _, _ in SCRIPTS], np.uint32)
_LASTS = np.array([last for _, last, _ in SCRIPTS], np.uint32)
_INDEX = np.array([NAMES.index(name) for _, _, name in SCRIPTS])
