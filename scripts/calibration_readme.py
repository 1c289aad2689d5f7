"""The README and the notices that go with the default calibration file."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer

from scripts.calibration_sources import VERSIONS, copyright_notice

_BEGIN, _END = "<!-- figures: written by scripts/build_calibration.py -->", "<!-- end of figures -->"
_KEEPERS = {
    "libpython3.11-stdlib": "python3.11-doc"
}  # whose copyright file serves for a package that links to it


def refresh(folder: Path, tokenizers: dict[str, Path]) -> None:
    """Writes the figures of `default.parquet` into the README beside it."""
    readme = folder / "README.md"
    head, _, rest = readme.read_text(encoding="utf-8").partition(_BEGIN)
    tail = rest.partition(_END)[2]
    readme.write_text(
        f"{head}{_BEGIN}\n\n{figures(folder / 'default.parquet', tokenizers)}\n{_END}{tail}", encoding="utf-8"
    )


def figures(path: Path, tokenizers: dict[str, Path]) -> str:
    """The file's sha256 and sizes, then its shares by kind, language and source, as Markdown."""
    rows = pq.read_table(path).to_pylist()
    text = "".join(row["text"] for row in rows)
    lines = [
        "| | |",
        "|---|---|",
        f"| sha256 | `{hashlib.sha256(path.read_bytes()).hexdigest()}` |",
        f"| sha256 of the joined text | `{hashlib.sha256(text.encode()).hexdigest()}` |",
        f"| written by | pyarrow {pa.__version__} |",
        f"| rows | {len(rows)} |",
        f"| characters | {len(text)} |",
        f"| bytes of the file | {path.stat().st_size} |",
    ]
    for name, tokenizer in tokenizers.items():
        count = len(
            Tokenizer.from_file(str(tokenizer / "tokenizer.json")).encode(text, add_special_tokens=False).ids
        )
        lines.append(f"| tokens, {name} | {count} |")
    for title, key in (("kind", _kind), ("language", _language), ("source", _source)):
        lines += ["", *_shares(title, rows, key)]
    return "\n".join(lines) + "\n"


def _kind(row: dict[str, str]) -> tuple[str, ...]:
    return (row["kind"],)


def _language(row: dict[str, str]) -> tuple[str, ...]:
    return (row["language"],)


def _source(row: dict[str, str]) -> tuple[str, ...]:
    return row["source"], row["package"], row["licence"]


def _shares(
    title: str, rows: list[dict[str, str]], key: Callable[[dict[str, str]], tuple[str, ...]]
) -> Iterable[str]:
    counts: dict[tuple[str, ...], list[int]] = defaultdict(lambda: [0, 0])
    for row in rows:
        counts[key(row)][0] += 1
        counts[key(row)][1] += len(row["text"])
    total = sum(size for _, size in counts.values())
    extra = ["Debian package", "licence"] if title == "source" else []
    yield "| " + " | ".join([title, *extra, "rows", "characters", "share"]) + " |"
    yield "|" + "---|" * (1 + len(extra)) + "--:|--:|--:|"
    for names, (count, size) in sorted(counts.items(), key=lambda item: (-item[1][1], item[0])):
        version = f" {VERSIONS[names[1]]}" if extra and names[1] in VERSIONS else ""
        cells = [names[0], *(name + version * (i == 0) for i, name in enumerate(names[1:]))]
        yield "| " + " | ".join([*cells, str(count), str(size), f"{100 * size / total:.1f} %"]) + " |"


def write_notices(path: Path, packages: Path) -> None:
    """One file with the copyright file of every package, in the order of their names."""
    parts = []
    for package in VERSIONS:
        notice = copyright_notice(_KEEPERS.get(package, package), packages)
        parts.append(f"{'=' * 100}\n{package} {VERSIONS[package]}\n{'=' * 100}\n\n{notice.strip()}\n\n")
    path.write_text("".join(parts), encoding="utf-8")
