"""Files written so that a reader sees the old one or the new one, never a part; JSON read strictly.

What the system refuses stays an OSError.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from exlq import faults

CHUNK_BYTES = 1 << 20
MOST_JSON_BYTES = 1 << 24  # in memory JSON takes up to 28 times its size
MOST_JSON_LEVELS = 64
MOST_DIGITS = 40  # of a whole number; tokenizer_config.json has one of 31


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Write beside `path` in its directory, flush to the disk, then take the name `path`."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with naming(path), beside.open("wb") as file:
            file.write(data)
            faults.point(f"{path.name} part")
            file.flush()
            os.fsync(file.fileno())
        faults.point(f"{path.name} rename")
        beside.replace(path)
        faults.point(f"{path.name} written")
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Gives an OSError that names no file, as that of a write does, the name `path`."""
    try:
        yield
    except OSError as exc:
        if exc.filename is not None:
            raise
        number = exc.errno or _short_write(path)
        raise OSError(number, os.strerror(number), str(path)) from exc


def _short_write(path: Path) -> int:
    """The error of a write of which numpy says only that it was short."""
    place = path if path.is_dir() else path.parent
    return errno.ENOSPC if shutil.disk_usage(place).free < CHUNK_BYTES else errno.EIO


def reserve(path: Path, n_bytes: int) -> None:
    """Makes `path` a file of at least so many bytes, all of them with a place on the disk.

    What it holds stays. Whoever maps a file into memory wants this first: where the disk is full, a
    write to a mapped hole ends the process. Off Linux the file is left for the mapping to make.

    Raises:
        OSError: naming `path`, if there is no room for it, or it cannot be written to.
    """
    if sys.platform != "linux" or not n_bytes:
        return
    with naming(path), path.open("ab") as file:
        before = os.fstat(file.fileno())
        if n_bytes - 512 * before.st_blocks > shutil.disk_usage(path).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # without filling the disk first
        try:
            os.posix_fallocate(file.fileno(), 0, n_bytes)
        except OSError:
            file.truncate(before.st_size)
            raise


def atomic_write_text(path: Path, text: str) -> None:
    """`atomic_write_bytes` of UTF-8; line ends stay as they are on every system."""
    atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_json(path: Path, value: Any) -> None:
    """JSON with one value per line, keys in the order given, a newline at the end.

    Raises ValueError on NaN and infinities, which JSON does not have.
    """
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    atomic_write_text(path, text + "\n")


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises ValueError as `parse_json` does.
    """
    with path.open("rb") as file:
        return parse_json(file.read(MOST_JSON_BYTES + 1))


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text that somebody else wrote.

    Raises ValueError on anything but strict JSON: NaN, infinities, numbers beyond float64, a key
    given twice in one object, bytes that are not UTF-8; and beyond the limits above, so that
    neither memory nor the stack can run out.
    """
    if len(text) > MOST_JSON_BYTES:
        raise ValueError(f"longer than the {MOST_JSON_BYTES:,} bytes that are read of JSON")
    try:
        tree = json.loads(
            text,
            parse_constant=_refuse,
            parse_float=_finite,
            parse_int=_short,
            object_pairs_hook=_unique,
        )
    except RecursionError as exc:
        raise ValueError("nested too deeply") from exc
    _require_levels(tree)
    return tree


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite(digits: str) -> float:
    value = float(digits)
    return value if math.isfinite(value) else _refuse(digits)


def _short(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits, at most {MOST_DIGITS} are read")
    return int(digits)


def _require_levels(tree: Any) -> None:
    level = [tree]
    for _ in range(MOST_JSON_LEVELS):
        level = [below for value in level for below in _members(value)]
        if not level:
            return
    raise ValueError("nested too deeply")


def _members(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{twice!r} is given twice in one object")
    return entries


def sha256_file(path: Path) -> str:
    """SHA-256 of the file's bytes in hexadecimal, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(CHUNK_BYTES):
            digest.update(piece)
    return digest.hexdigest()
