"""Files written so that a reader sees the old one or the new one, never a part; JSON read strictly.

What the system refuses stays an OSError.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any, NoReturn

CHUNK_BYTES = 1 << 20


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Write beside `path` in its directory, flush to the disk, then take the name `path`."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
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

    Raises ValueError on anything but strict JSON: NaN, infinities, numbers beyond float64, a key
    given twice in one object, nesting too deep to parse, bytes that are not UTF-8.
    """
    try:
        return json.loads(
            path.read_bytes(), parse_constant=_refuse, parse_float=_finite, object_pairs_hook=_unique
        )
    except RecursionError as exc:
        raise ValueError("nested too deeply") from exc


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite(digits: str) -> float:
    value = float(digits)
    return value if math.isfinite(value) else _refuse(digits)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} is given twice in one object")
    return entries


def sha256_file(path: Path) -> str:
    """SHA-256 of the file's bytes in hexadecimal, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(CHUNK_BYTES):
            digest.update(piece)
    return digest.hexdigest()
