"""Builds calibration/default.parquet and its README from the text of Debian packages.

Usage, from the root of the repository:
    python -m scripts.build_calibration --packages /tmp/packages --download

`--download` fetches the pinned packages with `apt-get download` (nothing is installed); without it the
folder must hold the .deb files already. The same packages and the same pyarrow give the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from scripts.calibration_forms import TEMPLATES, mask_rare, noise, spaced
from scripts.calibration_readers import Document
from scripts.calibration_readme import refresh, write_notices
from scripts.calibration_sources import VERSIONS, Source, documents
from scripts.calibration_table import SOURCES

SEED = 20260501
PASSAGE_CHARS = {"prose": 3200, "code": 2600, "dialogue": 1600, "multilingual": 1500}
NOISE_ROWS = 12
SPACED_MARK = " (spaced)"
CALIBRATION = Path(__file__).resolve().parent.parent / "calibration"

_BOILERPLATE = re.compile(
    r"copyright|©|licen[cs]e|warranty|gutenberg|https?://|www\.|@[a-z]+\.|\bnigger|\bwhore|prostitut|porn|suicid|\brape|fuck",
    re.IGNORECASE,
)
_ENGLISH = frozenset(
    "the and that this with you it not from have which such has will when your its these".split()
)
_NON_LATIN = frozenset("ja zh_CN ko ru uk el".split())
_SENTENCE_END = tuple(".!?…\"”’'»)。！？）」")


class Row(NamedTuple):
    """One passage as the parquet file holds it."""

    text: str
    source: str
    package: str
    kind: str
    language: str
    licence: str


def collect(source: Source, packages: Path, seen: set[str]) -> list[Row]:
    """The source's passages up to its budget, in an order that depends on their text and the seed only.

    `seen` holds the paragraphs of all sources so far and is added to.
    """
    made = documents(source, packages)
    repeated = {p for p, n in Counter(p for document in made for p in set(document)).items() if n > 1}
    passages = [p for document in made for p in _passages(source, document, repeated | seen)]
    chosen, size = [], 0
    for text in sorted(set(passages), key=_rank):
        if size < source.budget:
            chosen.append(text)
            size += len(text)
    seen.update(p for text in chosen for p in text.split("\n\n"))
    return [_row(source, text, i) for i, text in enumerate(chosen)]


def _row(source: Source, text: str, place: int) -> Row:
    """One passage as it goes into the file; the source's share of them is put in the spaced form."""
    rewritten = int((place + 1) * source.spaced) > int(place * source.spaced)
    name = source.name + SPACED_MARK if rewritten else source.name
    text = spaced(text, source.headed) if rewritten else text.rstrip("\n") + "\n\n"
    return Row(text, name, source.package, source.kind, source.language, source.licence)


def _rank(text: str) -> bytes:
    return hashlib.sha256(f"{SEED}\n{text}".encode()).digest()


def _passages(source: Source, document: Document, unwanted: set[str]) -> list[str]:
    if source.kind == "dialogue":
        return _dialogue(source, document)
    if source.kind != "code":
        document = [p for p in document if p not in unwanted and reads_well(p, source.language)]
    return list(cut(document, PASSAGE_CHARS[source.kind]))


def reads_well(paragraph: str, language: str) -> bool:
    """Whether a paragraph is running text in the language: no heading, table, notice or leftover markup."""
    if not 20 <= len(paragraph) <= 6000 or paragraph[0].islower():
        return False
    letters = sum(c.isalpha() or c == " " for c in paragraph) / len(paragraph)
    return (
        letters > 0.85
        and paragraph.endswith(_SENTENCE_END)
        and not _BOILERPLATE.search(paragraph)
        and not re.search(r"\\[a-z(\[]|[{}|]|<[a-z/]", paragraph)
        and is_in(language, paragraph)
    )


def is_in(language: str, text: str) -> bool:
    """Whether text has the script of the language and, but for English, few English words."""
    if language in _NON_LATIN:
        return sum(ord(c) > 0x2FF for c in text) > 0.4 * len(text)
    words = re.findall(r"[a-z]+", text.lower())
    return language == "en" or sum(word in _ENGLISH for word in words) < 0.06 * len(words) + 0.5


def cut(document: Document, size: int) -> Iterable[str]:
    """Consecutive paragraphs joined to passages of about `size` characters; short leftovers are dropped."""
    passage: list[str] = []
    for paragraph in document:
        passage.append(paragraph)
        if sum(map(len, passage)) >= size:
            yield "\n\n".join(passage)
            passage = []
    if sum(map(len, passage)) >= size // 3:
        yield "\n\n".join(passage)


def _dialogue(source: Source, turns: Document) -> list[str]:
    """One dialogue in the form of one chat template; none where a turn is a notice or in another language."""
    if len(turns[-1]) < 40 or any(_BOILERPLATE.search(t) or not is_in(source.language, t) for t in turns):
        return []
    return [TEMPLATES[_rank(turns[0])[0] % len(TEMPLATES)](turns)]


def with_unknowns(rows: list[Row]) -> list[Row]:
    """The rows with the rare words of the spaced ones masked."""
    masked = mask_rare([row.text for row in rows], [row.text for row in rows if row.language == "en"])
    return [
        row._replace(text=text) if row.source.endswith(SPACED_MARK) else row
        for row, text in zip(rows, masked, strict=True)
    ]


def noise_rows(rows: list[Row]) -> list[Row]:
    """The rows without meaning; their words come from the text of all sources."""
    natural = [row.text for row in rows if row.kind in ("prose", "multilingual")]
    words = sorted({word for text in natural for word in text.split() if len(word) < 20})
    return [
        Row(text + "\n\n", "random", "none", "random", "none", "CC0-1.0")
        for text in noise(words, NOISE_ROWS, SEED)
    ]


def weave(groups: list[list[Row]]) -> list[Row]:
    """All rows in one order in which every source is spread evenly from the first row to the last."""
    placed = [
        ((i + _rank(row.text)[1] / 256) / len(rows), _rank(row.text), row)
        for rows in groups
        for i, row in enumerate(rows)
    ]
    return [row for _, _, row in sorted(placed)]


def write(rows: list[Row], path: Path) -> None:
    """The parquet file, written beside and renamed."""
    columns = {name: [getattr(row, name) for row in rows] for name in Row._fields}
    beside = path.with_suffix(".part")
    pq.write_table(pa.table(columns), beside, compression="zstd", compression_level=19, row_group_size=256)
    beside.replace(path)


def download(packages: Path) -> None:
    """Fetches the pinned packages that the folder lacks; nothing is installed."""
    packages.mkdir(parents=True, exist_ok=True)
    for package, version in VERSIONS.items():
        if not list(packages.glob(f"{package}_{version.replace(':', '%3a')}_*.deb")):
            subprocess.run(["apt-get", "download", f"{package}={version}"], cwd=packages, check=True)


def gather(packages: Path) -> list[Row]:
    """All rows of the file in their order; what each source gave is printed."""
    seen: set[str] = set()
    groups = []
    for source in SOURCES:
        groups.append(collect(source, packages, seen))
        size = sum(len(row.text) for row in groups[-1])
        print(
            f"{source.kind:12} {source.language:10} {size:7} of {source.budget:6} characters  {source.name}"
        )
    noisy = noise_rows([row for rows in groups for row in rows])
    return with_unknowns(weave([*groups, noisy]))


def main() -> None:
    """Command line: builds the file, the notices and the README's figures."""
    parser = argparse.ArgumentParser(description="Builds the default calibration text from Debian packages.")
    parser.add_argument("--packages", type=Path, required=True, help="folder of the .deb files")
    parser.add_argument("--download", action="store_true", help="fetch what it lacks with apt-get download")
    parser.add_argument("--output", type=Path, default=CALIBRATION, help="folder of default.parquet")
    parser.add_argument("--tokenizer", type=_named, action="append", default=[], metavar="NAME=FOLDER")
    options = parser.parse_args()
    if options.download:
        download(options.packages)
    write(gather(options.packages), options.output / "default.parquet")
    write_notices(options.output / "licences.txt", options.packages)
    refresh(options.output, dict(options.tokenizer))


def _named(argument: str) -> tuple[str, Path]:
    name, _, folder = argument.partition("=")
    return name, Path(folder)


if __name__ == "__main__":
    main()
