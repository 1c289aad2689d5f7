"""The table of calibration sources: one line each; the budgets set the shares."""

from __future__ import annotations

from scripts import calibration_readers as read
from scripts.calibration_sources import Source

_GNOME_LANGUAGES = "de fr es it pt_BR ru pl nl cs sv uk hu ko el fi ro da hr".split()
_TASK_LANGUAGES = "de fr es ru pt_BR ko".split()
_REFERENCE_LANGUAGES = {
    "de": "de",
    "es": "es",
    "fr": "fr",
    "it": "it",
    "ja": "ja",
    "pt": "pt",
    "zh-cn": "zh_CN",
}
_LZ4 = "golang-github-pierrec-lz4-dev"
_BOOKS = "*/pierrec/lz4/testdata"
_GO = "./usr/share/go-1.19/src"
_PYTHON = "./usr/lib/python3.11/[a-z]*.py"
_HEADED = (read.jargon, read.wordnet, read.webster, read.encyclopedia)
_PD, _GPL, _PSF, _SHARE = "public domain", "GPL-2.0-or-later", "PSF-2.0", "CC-BY-SA-3.0"


def _prose() -> list[Source]:
    rows = [
        ("Jane Austen, novels", "r-cran-janeaustenr", "*/data/Rdata.rdb", read.r_strings, _PD, 190_000, 0.5),
        ("Conan Doyle, Sherlock Holmes", _LZ4, f"{_BOOKS}/pg1661.txt", read.book, _PD, 150_000, 0.5),
        ("Isaac Newton, Opticks", "golang-1.19-src", f"{_GO}/testdata/Isaac*", read.book, _PD, 60_000, 0.5),
        ("Copyright does not exist", "cfi-en", "*/html/ch*.htm", read.html, _PD, 250_000, 0.75),
        ("Jargon File", "dict-jargon", "*.dict.dz", read.jargon, _PD, 110_000, 0.75),
        ("WordNet, proper nouns", "dict-wn", "*.dict.dz", read.wordnet, "WordNet-3.0", 140_000, 0.75),
        ("GCIDE", "dict-gcide", "*.dict.dz", read.webster, _GPL, 60_000, 0.0),
        ("FOLDOC", "dict-foldoc", "*.dict.dz", read.encyclopedia, "GFDL-1.1-or-later", 170_000, 0.75),
        ("Debian history", "debian-history", "*/detailed.en.html", read.html, _GPL, 20_000, 0.75),
        ("Python HOWTOs", "python3.11-doc", "*/html/howto/[!c]*.html", read.html, _PSF, 60_000, 0.0),
        ("Python, what is new", "python3.11-doc", "*/html/whatsnew/[23]*.html", read.html, _PSF, 30_000, 0.5),
        ("PostgreSQL manual", "postgresql-doc-15", "*/html/*.html", read.html, "PostgreSQL", 60_000, 0.5),
        ("GNOME help", "gnome-user-docs", "*/help/C/gnome-help/*.page", read.mallard, _SHARE, 30_000, 0.5),
    ]
    return [
        Source(name, package, at, how, "prose", "en", licence, budget, spaced, headed=how in _HEADED)
        for name, package, at, how, licence, budget, spaced in rows
    ]


def _code() -> list[Source]:
    rows = [
        ("Python library", "libpython3.11-stdlib", _PYTHON, "python", _PSF, 80_000),
        ("Go library", "golang-1.19-src", f"{_GO}/t*/[a-z]*[!t].go", "go", "BSD-3-Clause", 30_000),
        ("zlib examples", "zlib1g-dev", "*/examples/[a-z]*.c", "c", "Zlib", 30_000),
        ("Underscore", "libjs-underscore", "*/underscore.js", "javascript", "MIT", 20_000),
        ("regex-syntax", "librust-regex-syntax-dev", "*/src/ast/*.rs", "rust", "MIT OR Apache-2.0", 20_000),
        ("bash-completion", "bash-completion", "*/completions/[a-z]*", "shell", _GPL, 15_000),
    ]
    return [
        Source(name, package, at, read.code, "code", language, licence, budget)
        for name, package, at, language, licence, budget in rows
    ]


def _dialogue() -> list[Source]:
    def source(name: str, package: str, at: str, how: read.Reader, licence: str, budget: int) -> Source:
        return Source(name, package, at, how, "dialogue", "en", licence, budget)

    return [
        source("Python FAQ", "python3.11-doc", "*/html/faq/*.html", read.faq, _PSF, 60_000),
        source("Python functions", "libpython3.11-stdlib", _PYTHON, read.functions, _PSF, 50_000),
        source("Holmes and callers", _LZ4, f"{_BOOKS}/pg1661.txt", read.conversations, _PD, 30_000),
        _gnome("GNOME help, tasks", "C", read.tasks, "dialogue", 30_000),
        *(
            _gnome("GNOME help, tasks", language, read.tasks, "dialogue", 4_000)
            for language in _TASK_LANGUAGES
        ),
    ]


def _multilingual() -> list[Source]:
    def source(name: str, package: str, at: str, how: read.Reader, language: str, licence: str) -> Source:
        return Source(name, package, at, how, "multilingual", language, licence, 7_000)

    return [
        *(
            _gnome("GNOME help", language, read.mallard, "multilingual", 5_000)
            for language in _GNOME_LANGUAGES
        ),
        *(
            source("Debian Reference", f"debian-reference-{code}", "*/ch*.html", read.html, language, _GPL)
            for code, language in _REFERENCE_LANGUAGES.items()
        ),
        source("Debian history", "debian-history", "*/detailed.ja.html", read.html, "ja", _GPL),
        source("Debian history", "debian-history", "*/detailed.ru.html", read.html, "ru", _GPL),
        source(
            "manual pages", "manpages-zh", "*/man/zh_CN/man[17]/*", read.man, "zh_CN", "GFDL-1.2-or-later"
        ),
        source("manual pages", "manpages-tr", "*/man/tr/man[17]/*", read.man, "tr", _GPL),
    ]


def _gnome(name: str, folder: str, how: read.Reader, kind: str, budget: int) -> Source:
    language = "en" if folder == "C" else folder
    at = f"*/help/{folder}/gnome-help/*.page"
    return Source(name, "gnome-user-docs", at, how, kind, language, _SHARE, budget)


SOURCES: tuple[Source, ...] = (*_prose(), *_code(), *_dialogue(), *_multilingual())
