"""What identifies a model and a tokenizer: sha256 of the files that define them."""

from __future__ import annotations

import hashlib
from pathlib import Path

from exlq.checkpoint.files import find_weight_files
from exlq.errors import ModelError
from exlq.files import sha256_file

_TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template*",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


def file_hashes(directory: Path) -> dict[str, str]:
    """File name → sha256 in hex, of config.json, the weight files and their index, sorted by name."""
    files = find_weight_files(directory)
    names = {"config.json", *files.names} | ({files.index} if files.index else set())
    if not (directory / "config.json").is_file():
        raise ModelError(f"no config.json in {directory}; wanted a Hugging Face model directory")
    return {name: sha256_file(directory / name) for name in sorted(names)}


def tokenizer_hash(directory: Path) -> str:
    """One sha256 in hex over the names and contents of the tokenizer's files, sorted by name."""
    found = {path for pattern in _TOKENIZER_FILES for path in directory.glob(pattern) if path.is_file()}
    if not found:
        raise ModelError(f"no tokenizer in {directory}; wanted tokenizer.json or tokenizer.model")
    whole = hashlib.sha256()
    for path in sorted(found, key=lambda path: path.name):
        whole.update(f"{path.name}\0{sha256_file(path)}\n".encode())
    return whole.hexdigest()
