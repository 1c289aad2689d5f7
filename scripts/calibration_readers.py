"""Readers of the calibration sources: bytes of one packaged file → documents, each a list of paragraphs."""

from __future__ import annotations

import ast
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from itertools import chain, takewhile
from xml.etree import ElementTree

Document = list[str]
Reader = Callable[[bytes], list[Document]]

_BLOCKS = frozenset(
    "p div h1 h2 h3 h4 h5 h6 li ul ol dl dt dd td tr th table section blockquote body hr br".split()
)
_SILENT = frozenset("script style head nav pre sup title footer".split())
_CJK = r"[\u3000-\u30ff\u3400-\u9fff\uff00-\uffef]"
_FONT_MACROS = frozenset("B I SM SB R BR RB BI IB IR RI".split())
_SENSE = r"(?:^|\n) {3}(?:\d+\. +)?(?:\([A-Z][a-z.]*\) )?([A-Z][^\n]{30,}(?:\n {3,8}\S[^\n]*)*)"
_BREAKS = frozenset("PP P LP TP IP HP SH SS TQ sp RS RE".split())
_VERBATIM = {"ig": ".", "TS": "TE", "nf": "fi", "EX": "EE"}
_ROFF_ESCAPES = {
    "aq": "'", "dq": '"', "em": "—", "en": "–", "bu": "•", "co": "©", "lq": "“", "rq": "”",
    "oq": "‘", "cq": "’", "ha": "^", "ti": "~", "Fo": "«", "Fc": "»", "rs": "\\", "ga": "`",
}  # fmt: skip


def unwrap(text: str) -> str:
    """One line from a wrapped paragraph; no space is put between two Chinese or Japanese characters."""
    line = " ".join(text.split())
    return re.sub(rf"(?<={_CJK}) (?={_CJK})", "", line)


def paragraphs(text: str) -> Document:
    """The unwrapped paragraphs of text in which blank lines part them."""
    return [unwrap(part) for part in re.split(r"\n\s*\n", text) if part.strip()]


def book(data: bytes) -> list[Document]:
    """A plain-text book: an e-book frame around it and emphasis marks are dropped."""
    text = data.decode("utf-8-sig").replace("\r\n", "\n")
    inner = re.search(r"\*\*\* ?START OF.*?\*\*\*(.*)\*\*\* ?END OF", text, re.DOTALL)
    text = inner.group(1) if inner else text
    text = re.sub(r"\[(Illustration|Footnote|_?Illustration)[^\]]*\]", "", text)
    text = re.sub(r"\[(in )?_Fig_?\. ?[^\]]*\] ?", "", text)
    return [paragraphs(re.sub(r"_([^_\n]*(?:\n[^_\n]+)*)_", r"\1", text))]


def r_strings(data: bytes) -> list[Document]:
    """Books kept as one string a line in an R lazy-load database of zlib streams.

    Each record is a big-endian length and a stream; strings in it follow the XDR header of a CHARSXP.
    """
    documents, at = [], 0
    while at < len(data):
        stream = zlib.decompressobj()
        record = stream.decompress(data[at + 4 :])
        at = len(data) - len(stream.unused_data)
        lines = list(_char_records(record))
        if len(lines) > 5000:
            documents += book("\n".join(lines).encode())
    return documents


def _char_records(record: bytes) -> Iterator[str]:
    for found in re.finditer(rb"\x00[\x04\x00][\x00\x80]\x09", record):
        (length,) = struct.unpack(">i", record[found.end() : found.end() + 4].ljust(4, b"\xff"))
        if 0 <= length < 200:
            yield record[found.end() + 4 : found.end() + 4 + length].decode("utf-8", "replace")


class _Blocks(HTMLParser):
    """Collects the text of a page; block elements part paragraphs."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.silent = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _SILENT:
            self.silent += 1
        elif tag in _BLOCKS:
            self.parts.append("\n\n")
        if re.fullmatch("h[1-4]", tag):
            self.parts.append("# ")

    def handle_endtag(self, tag: str) -> None:
        if tag in _SILENT:
            self.silent = max(0, self.silent - 1)
        elif tag in _BLOCKS:
            self.parts.append("\n\n")

    def handle_data(self, data: str) -> None:
        if not self.silent:
            self.parts.append(re.sub(r"\s+", " ", data))


def html(data: bytes) -> list[Document]:
    """One page; headings come as paragraphs that begin with `# `."""
    head = data[:600].lower()
    encoding = "latin-1" if b"iso-8859-1" in head else "utf-8"
    parser = _Blocks()
    parser.feed(data.decode(encoding, "replace").replace("¶", ""))
    return [paragraphs("".join(parser.parts))]


def mallard(data: bytes) -> list[Document]:
    """One page of GNOME help: the text of its `p` elements outside `info` and `note`."""
    root = ElementTree.fromstring(data)
    for parent in list(root.iter()):
        for child in [c for c in parent if _local(c) in ("info", "screen", "note")]:
            parent.remove(child)
    return [[_spoken(p) for p in root.iter() if _local(p) == "p"]]


def _spoken(element: ElementTree.Element) -> str:
    """The text of an element, key combinations joined by `+`; empty if a link in it has no text."""
    if any(_local(e) == "link" and not "".join(e.itertext()).strip() for e in element.iter()):
        return ""
    for inner in element.iter():
        if _local(inner) == "keyseq":
            for key in list(inner)[:-1]:
                key.tail = "+"
        elif _local(inner) == "media":
            inner.text = None
            inner[:] = []
    return unwrap("".join(element.itertext()))


def _local(element: ElementTree.Element) -> str:
    return str(element.tag).rpartition("}")[2]


def man(data: bytes) -> list[Document]:
    """One manual page written with the `man` macros; examples and tables are dropped."""
    out: list[str] = []
    until = ""
    tag_next = False
    for line in data.decode("utf-8", "replace").splitlines():
        macro, _, rest = line[1:].strip().partition(" ") if line[:1] in (".", "'") else ("", "", line)
        if until:
            until = "" if macro == until else until
        elif macro in _VERBATIM:
            until = _VERBATIM[macro]
            out.append("\n\n")
        elif macro in _BREAKS:
            out.append("\n\n")
            tag_next = macro in ("TP", "TQ")
        elif not macro or macro in _FONT_MACROS:
            glue = "" if len(macro) == 2 and macro not in ("SM", "SB") else " "
            out.append(_roff_text(rest, glue) if macro else _roff_text_line(rest))
            out.append("\n\n" if tag_next else "\n")
            tag_next = False
    return [paragraphs("".join(out))]


def _roff_text(arguments: str, glue: str) -> str:
    found = re.findall(r'"((?:[^"]|"")*)"|(\S+)', arguments.replace(r"\ ", "\\~"))
    return _roff_text_line(glue.join(quoted or bare for quoted, bare in found))


def _roff_text_line(line: str) -> str:
    line = re.sub(r'\\".*', "", line)
    line = re.sub(r"\\f(\[[^\]]*\]|\(..|.)|\\s[-+]?\d|\\\*(\(..|\[[^\]]*\]|.)|\\m\[[^\]]*\]", "", line)
    line = re.sub(r"\\(?:\((..)|\[([^\]]*)\])", lambda m: _ROFF_ESCAPES.get(m[1] or m[2], ""), line)
    line = line.replace(r"\-", "-").replace(r"\~", " ").replace(r"\ ", " ").replace(r"\e", "\\")
    return re.sub(r"\\[&/,%:c|^)!?]", "", line)


def jargon(data: bytes) -> list[Document]:
    """Entries of the Jargon File: the headword and its paragraphs, without grammar and pronunciation."""
    documents = []
    for head, body in _entries(data):
        kept = [p for p in body if len(p) > 40]
        documents += [[f"{head}: {kept[0]}", *kept[1:]]] if kept else []
    return documents


def encyclopedia(data: bytes) -> list[Document]:
    """Entries of FOLDOC that define something at length."""
    documents = []
    for head, body in _entries(data):
        kept = [re.sub(r"^<[^>]*> *(\([^)]*\) )?", "", p) for p in body if not re.match(r"\(\d{4}-", p)]
        if kept and len(kept[0]) > 150:
            documents.append([f"{head}: {kept[0]}", *kept[1:]])
    return documents


def webster(data: bytes) -> list[Document]:
    """Entries of GCIDE: the senses of a word in one paragraph, without etymology and quotations."""
    text = data.decode("utf-8", "replace")
    text = re.sub(r"\[[^\[\]]*(Webster|PJC|WordNet)[^\[\]]*\]", "", text)
    documents: list[Document] = []
    for entry in re.split(r"\n(?=\S[^\n]*\\)", text):
        head, _, body = entry.partition("\\")
        body = "\n".join(line for line in body.splitlines()[1:] if not line.startswith(" " * 9))
        senses = re.findall(_SENSE, body)
        joined = unwrap(" ".join(senses)).replace("{", "").replace("}", "")
        if senses and head.strip() and not re.search(r"[?\[\]\\]|--|Note:", joined):
            documents.append([f"{head.strip()}. {joined}"])
    return _bundles(documents, 40)


def wordnet(data: bytes) -> list[Document]:
    """Proper nouns of WordNet with their glosses, thirty to a document; a gloss keeps its first name only."""
    names: dict[str, str] = {}
    for entry in re.split(r"\n(?=\S)", data.decode("utf-8", "replace")):
        head, _, body = entry.partition("\n")
        gloss = re.match(r"n 1: (.*?)(?:; \"| \[| 2: |$)", unwrap(body))
        if (
            gloss
            and len(gloss[1]) > 70
            and "genus" not in gloss[1]
            and all(w[0].isupper() or w in ("of", "the") for w in head.split())
        ):
            names.setdefault(gloss[1], head.strip())
    return _bundles([[f"{name}: {gloss}."] for gloss, name in names.items()], 30)


def _bundles(documents: list[Document], size: int) -> list[Document]:
    return [list(chain.from_iterable(documents[i : i + size])) for i in range(0, len(documents), size)]


def _entries(data: bytes) -> Iterator[tuple[str, Document]]:
    """Headword and paragraphs of each entry of a DICT database; cross-reference braces are dropped."""
    text = data.decode("utf-8", "replace")
    for entry in re.split(r"\n\n(?=\S)", text):
        head, _, body = entry.partition("\n")
        head = head.strip()
        parts = paragraphs(re.sub(r"\{\s*([^{}]*?)\s*\}", r"\1", "\n" + body))
        yield head, parts


def code(data: bytes) -> list[Document]:
    """Source text in blocks parted by blank lines, as it stands, without the notices."""
    blocks = re.split(r"\n{2,}", data.decode("utf-8", "replace").expandtabs(4).strip("\n"))
    notice = re.compile(r"copyright|licen[cs]e|SPDX", re.IGNORECASE)
    return [[block.rstrip() for block in blocks if not notice.search(block)]]


def functions(data: bytes) -> list[Document]:
    """Documented functions of a Python module, each as a request for it and the source that answers."""
    text = data.decode("utf-8")
    made: list[Document] = []
    for node in ast.parse(text).body:
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
            continue
        doc, source = ast.get_docstring(node), ast.get_source_segment(text, node)
        if doc and source and 60 < len(doc) < 900 and 300 < len(source) < 2500:
            request = f"Write a Python function `{node.name}`. Its docstring:\n\n{doc}"
            made.append([request, f"```python\n{source}\n```"])
    return made


def faq(data: bytes) -> list[Document]:
    """The questions of one page, each with its answer up to the first paragraph that leads to an example."""
    page = html(data)[0]
    heads = [i for i, paragraph in enumerate(page) if paragraph.startswith("# ")]
    made: list[Document] = []
    for begin, end in zip(heads, [*heads[1:], len(page)], strict=True):
        question = re.sub(r"^[\d.]+ *", "", page[begin].strip("# "))
        answer = list(takewhile(lambda paragraph: not paragraph.endswith(":"), page[begin + 1 : end]))
        if question.endswith("?") and answer:
            made.append([question, "\n\n".join(answer)])
    return made


def tasks(data: bytes) -> list[Document]:
    """One GNOME help page that tells how to do something: its title, then introduction and numbered steps."""
    root = ElementTree.fromstring(data)
    title = next((unwrap("".join(e.itertext())) for e in root if _local(e) == "title"), "")
    steps = next((e for e in root.iter() if _local(e) == "steps"), None)
    if not title or steps is None:
        return []
    introduction = [_spoken(e) for e in root if _local(e) == "p"]
    items = [_spoken(e) for e in steps if _local(e) == "item"]
    numbered = "\n".join(f"{i}. {text}" for i, text in enumerate(items, 1))
    return [[title, "\n\n".join([*introduction, numbered])]] if all([*introduction, *items]) else []


def conversations(data: bytes) -> list[Document]:
    """Runs of four or more paragraphs of a book that hold nothing but a quoted speech, cut to pairs."""
    runs: list[Document] = [[]]
    for paragraph in book(data)[0]:
        speech = re.fullmatch(r'"([^"]{15,900})"', paragraph)
        if speech:
            runs[-1].append(speech[1])
        elif runs[-1]:
            runs.append([])
    return [run[: len(run) // 2 * 2] for run in runs if len(run) >= 4]
