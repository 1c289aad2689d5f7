"""The forms in which calibration text is written: chat templates, the spaced form of WikiText, noise."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from random import Random

Turns = list[str]


def _marked(opening: str, closing: str, names: tuple[str, str]) -> Callable[[Turns], str]:
    def form(turns: Turns) -> str:
        return "".join(opening.format(names[i % 2]) + turn + closing for i, turn in enumerate(turns))

    return form


def _instructed(turns: Turns) -> str:
    return "".join(f"[INST] {turn} [/INST]" if i % 2 == 0 else f" {turn}</s>" for i, turn in enumerate(turns))


TEMPLATES: tuple[Callable[[Turns], str], ...] = (
    _marked("<|im_start|>{}\n", "<|im_end|>\n", ("user", "assistant")),
    _marked("<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>", ("user", "assistant")),
    _marked("<start_of_turn>{}\n", "<end_of_turn>\n", ("user", "model")),
    _marked("### {}:\n", "\n\n", ("Instruction", "Response")),
    _marked("{}: ", "\n\n", ("User", "Assistant")),
    _marked("{}: ", "\n\n", ("Question", "Answer")),
    _marked("{}: ", "\n\n", ("Q", "A")),
    _instructed,
)


def spaced(passage: str, headed: bool) -> str:
    """The passage as WikiText writes text: one paragraph a line, punctuation set apart, ` = Head = `.

    Of a headed passage the long paragraphs are entries, each with its headword before a colon or full stop.
    """
    return "".join(_line(paragraph, headed) for paragraph in passage.split("\n\n"))


def _line(paragraph: str, headed: bool) -> str:
    entry = re.fullmatch(r"([^.:\n]{2,40})[:.] (.{120,})", paragraph, re.DOTALL)
    if headed and entry:
        return f" = {_apart(entry[1])} = \n {_apart(entry[2][0].upper() + entry[2][1:])} \n"
    return f" {_apart(paragraph)} \n"


def _apart(text: str) -> str:
    text = re.sub(r"[“”]", '"', text).replace("’", "'").replace("--", " — ")
    text = re.sub(r"""(,(?!\d)|[;:?!()"\[\]]|(?<=\w)'s\b|\.(?=["')\]]*(\s|$)))""", r" \1 ", text)
    text = re.sub(r"\b(Mrs?|Dr|St|No|vs|[A-Z]) \. (?=[\w ])", r"\1. ", text)
    text = re.sub(r"(?<=\d)([,.])(?=\d)", r" @\1@ ", text)
    text = re.sub(r"(?<=\d)-(?=\d)", " – ", text)
    text = re.sub(r"(?<=\w)-(?=\w)", " @-@ ", text)
    return " ".join(text.split())


def mask_rare(texts: list[str], every: list[str]) -> list[str]:
    """Spaced texts with `<unk>`, as WikiText has it, for words that come fewer than three times in `every`.

    Headings keep their words.
    """
    counts = Counter(word for text in every for word in re.findall(r"[^\W\d_]+", text))
    rare = {word for word, count in counts.items() if count < 3}
    return ["\n".join(_masked(line, rare) for line in text.split("\n")) for text in texts]


def _masked(line: str, rare: set[str]) -> str:
    if line.startswith(" = "):
        return line
    return " ".join("<unk>" if word in rare else word for word in line.split(" "))


def noise(words: list[str], count: int, seed: int) -> list[str]:
    """Texts without meaning: shuffled words, then letters of all scripts, then printable ASCII, in turn."""
    random = Random(seed)
    letters = [chr(c) for c in range(0xA1, 0x3000) if chr(c).isalpha()]
    printable = [chr(c) for c in range(0x20, 0x7F)]
    kinds = [(words, " ", 280), (letters, "", 500), (printable, "", 900)]
    made = []
    for i in range(count):
        alphabet, glue, length = kinds[i % len(kinds)]
        made.append(glue.join(alphabet[int(random.random() * len(alphabet))] for _ in range(length)))
    return made
