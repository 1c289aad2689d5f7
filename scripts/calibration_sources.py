"""Where the default calibration text comes from: files of Debian packages of pinned versions."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from scripts.calibration_readers import Document, Reader

# Debian 12 "bookworm"; a version that has left the mirrors is still on snapshot.debian.org.
VERSIONS = {
    "bash-completion": "1:2.11-6",
    "cfi-en": "3.0-10.2",
    "debian-history": "2.28",
    "debian-reference-de": "2.100",
    "debian-reference-es": "2.100",
    "debian-reference-fr": "2.100",
    "debian-reference-it": "2.100",
    "debian-reference-ja": "2.100",
    "debian-reference-pt": "2.100",
    "debian-reference-zh-cn": "2.100",
    "dict-foldoc": "20230119-1",
    "dict-gcide": "0.48.5+nmu2",
    "dict-jargon": "4.4.7-3.1",
    "dict-wn": "1:3.0-37",
    "gnome-user-docs": "43.0-2",
    "golang-1.19-src": "1.19.8-2",
    "golang-github-pierrec-lz4-dev": "2.5.2-2",
    "libjs-underscore": "1.13.4~dfsg+~1.11.4-3",
    "libpython3.11-stdlib": "3.11.2-6+deb12u9",
    "librust-regex-syntax-dev": "0.6.27-1",
    "manpages-tr": "2.0.6-2",
    "manpages-zh": "1.6.4.0-1",
    "postgresql-doc-15": "15.20-0+deb12u1",
    "python3.11-doc": "3.11.2-6+deb12u9",
    "r-cran-janeaustenr": "1.0.0-1",
    "zlib1g-dev": "1:1.2.13.dfsg-1",
}


@dataclass(frozen=True)
class Source:
    """Some files of one package, read one way; at most `budget` characters of them are kept."""

    name: str
    package: str
    members: str  # shell pattern of paths in the package
    read: Reader
    kind: str  # prose, code, dialogue, multilingual
    language: str
    licence: str
    budget: int
    spaced: float = 0.0  # share of the passages that are put in the form of WikiText
    headed: bool = False  # long paragraphs begin with a headword


def documents(source: Source, packages: Path) -> list[Document]:
    """Everything the source's reader finds in its package, in the order of the paths.

    Raises:
        FileNotFoundError: if the package of the pinned version is not in the folder, or has no such file.
    """
    found = sorted(_members(archive(source.package, packages), source.members))
    if not found:
        raise FileNotFoundError(f"no file of {source.package} matches {source.members}")
    return [document for _, data in found for document in source.read(data)]


def archive(package: str, packages: Path) -> Path:
    """The package's file in a folder, of the pinned version."""
    version = VERSIONS[package].replace(":", "%3a")
    found = sorted(packages.glob(f"{package}_{version}_*.deb"))
    if not found:
        raise FileNotFoundError(f"{package}_{version}_*.deb is not in {packages}; run with --download")
    return found[0]


def copyright_notice(package: str, packages: Path) -> str:
    """The package's own copyright file."""
    (notice,) = (
        data for _, data in _members(archive(package, packages), f"./usr/share/doc/{package}/copyright")
    )
    return notice.decode("utf-8", "replace")


def _members(deb: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    """Path and content of the files of a Debian package that match, decompressed where gzip packed them."""
    with tarfile.open(fileobj=io.BytesIO(_data_archive(deb.read_bytes())), mode="r:*") as tar:
        for member in tar:
            if member.isfile() and fnmatch(member.name, pattern):
                content = tar.extractfile(member)
                assert content is not None
                data = content.read()
                yield member.name, gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data


def _data_archive(deb: bytes) -> bytes:
    """The `data.tar.*` member of an `ar` archive: 60-byte headers, bodies padded to even lengths."""
    at = len(b"!<arch>\n")
    while at < len(deb):
        name, size = deb[at : at + 16].strip(), int(deb[at + 48 : at + 58])
        if name.startswith(b"data.tar"):
            return deb[at + 60 : at + 60 + size]
        at += 60 + size + size % 2
    raise FileNotFoundError("not a Debian package: it has no data.tar member")
