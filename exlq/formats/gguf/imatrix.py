"""Files of importance matrices, as llama-imatrix writes and llama-quantize reads them."""

from __future__ import annotations

from pathlib import Path

from exlq.errors import ModelError
from exlq.formats.gguf.imatrix_dat import read_dat, write_dat
from exlq.formats.gguf.imatrix_entries import Entry as Entry
from exlq.formats.gguf.imatrix_entries import Imatrix as Imatrix
from exlq.formats.gguf.imatrix_gguf import read_gguf, write_gguf

LEGACY = ".dat"


def load(path: Path) -> Imatrix:
    """The importance matrix in a GGUF or a legacy file, told apart by their first bytes.

    Raises:
        ModelError: if the file cannot be read or is no importance matrix.
    """
    try:
        with path.open("rb") as file:
            is_gguf = file.read(4) == b"GGUF"
        return read_gguf(path) if is_gguf else read_dat(path)
    except ModelError as exc:
        raise ModelError(f"{path} is no importance matrix of llama.cpp: {exc}") from exc
    except OSError as exc:
        raise ModelError(
            f"importance matrix {path} cannot be read: {exc.strerror}; give another file"
        ) from exc


def save(imatrix: Imatrix, path: Path) -> None:
    """Write the legacy form where the name ends in `.dat`, else GGUF.

    Raises:
        ModelError: for a name too long for GGUF.
    """
    (write_dat if path.suffix.lower() == LEGACY else write_gguf)(imatrix, path)
