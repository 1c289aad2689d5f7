"""The headers of safetensors files, without their data.

Layout (github.com/huggingface/safetensors, README, "Format"): 8 bytes little-endian header length, the header
as JSON, then the data without holes. Nothing is believed that does not fit into the file.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from exlq.checkpoint.files import header_bytes
from exlq.errors import ModelError
from exlq.files import parse_json

DTYPE_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
}


@dataclass(frozen=True)
class Stored:
    """One tensor; `begin` counts from the start of the file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    n_bytes: int

    @property
    def numel(self) -> int:
        return prod(self.shape)

    def read(self) -> bytes:
        """Its data; for the small ones."""
        with self.path.open("rb") as file:
            file.seek(self.begin)
            return file.read(self.n_bytes)


def read_headers(paths: Iterable[Path]) -> dict[str, Stored]:
    """The tensors of several files by name.

    Raises:
        ModelError: for a file that is no whole safetensors file, or a name that two hold.
    """
    found: dict[str, Stored] = {}
    for path in paths:
        for name, stored in _read_header(path).items():
            if name in found:
                raise ModelError(f"{path} holds {name}, which {found[name].path.name} holds too; keep one")
            found[name] = stored
    return found


def _read_header(path: Path) -> dict[str, Stored]:
    length, size = header_bytes(path), path.stat().st_size
    with path.open("rb") as file:
        file.seek(8)
        tree = _parsed(path, file.read(length))
    tree.pop("__metadata__", None)
    found = {name: _stored(path, name, entry, 8 + length) for name, entry in tree.items()}
    end = 8 + length
    for name, stored in sorted(found.items(), key=lambda item: (item[1].begin, item[1].n_bytes)):
        if stored.begin != end:
            raise _broken(path, f"{name} begins at byte {stored.begin}, the data before end at {end}")
        end += stored.n_bytes
    if end != size:
        raise _broken(path, f"its header describes {end} bytes, it has {size}")
    return found


def _parsed(path: Path, header: bytes) -> dict[str, Any]:
    try:
        tree = parse_json(header)
    except ValueError as exc:
        reason = " ".join(str(exc).split())
        raise _broken(path, f"its header is not JSON ({reason})") from exc
    if not isinstance(tree, dict):
        raise _broken(path, f"its header is a {type(tree).__name__}, not an object")
    return tree


def _stored(path: Path, name: str, entry: object, data: int) -> Stored:
    """An entry held against what its dtype and shape need."""
    if not isinstance(entry, dict):
        raise _broken(path, f"{name} is no object")
    dtype = entry.get("dtype")
    shape, place = _counts(entry.get("shape")), _counts(entry.get("data_offsets"))
    if not isinstance(dtype, str) or shape is None or place is None or len(place) != 2:
        raise _broken(path, f"{name} has no dtype, shape and place that make sense")
    begin, end = place
    bits = prod(shape) * DTYPE_BITS[dtype] if dtype in DTYPE_BITS else 8 * (end - begin)
    if begin > end or 8 * (end - begin) != bits:
        raise _broken(path, f"{name}, {dtype} {shape}, is said to lie at {begin} to {end}")
    return Stored(path, dtype, tuple(shape), data + begin, end - begin)


def _counts(value: object) -> list[int] | None:
    """The value if it is a list of whole numbers from 0."""
    good = isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)
    return value if good and isinstance(value, list) else None


def _broken(path: Path, what: str) -> ModelError:
    return ModelError(f"{path} is not a whole safetensors file: {what}; download it again")
