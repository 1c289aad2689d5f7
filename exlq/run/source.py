"""What a path holds that can be run: a GGUF file, an EXL2 or Hugging Face directory, a job's directory."""

from __future__ import annotations

import mmap
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from exlq.errors import ConfigError, ModelError
from exlq.evaluation.llamacpp_api import shared_library
from exlq.formats.gguf.header import BrokenHeaderError, read_header
from exlq.names import FORMATS

_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
_IMATRIX = "imatrix"  # general.type of files that hold no model


@dataclass(frozen=True)
class Source:
    """A model directory, EXL2 or not, or a GGUF file, of a split one the first shard."""

    kind: Literal["directory", "gguf"]
    path: Path


@dataclass(frozen=True)
class GgufFacts:
    """What a GGUF file says of itself; `n_bytes` are those of all shards."""

    context_length: int
    has_template: bool
    n_bytes: int


def find_source(path: Path, format: str | None = None) -> Source:
    """What to run of what lies at `path`.

    Args:
        path: a GGUF file, a model directory, a directory of GGUF files, or a job's directory with `exl2`,
            `gguf` or both in it.
        format: `exl2` or `gguf`, which of a job's outputs; GGUF where there are both and llama.cpp is
            installed, else EXL2, where None.

    Raises:
        ModelError: if there is nothing to run.
        ConfigError: if a format is asked for that is not there.
    """
    if path.is_file():
        found = {"file": path}
    elif path.is_dir():
        found = _in_directory(path)
    else:
        raise ModelError(f"{path}: no such file or directory; a GGUF file or a model directory was wanted")
    if not found:
        raise ModelError(
            f"{path}: no model here; a directory with config.json, one with exl2 or gguf of exlq convert, "
            "or a GGUF file was wanted"
        )
    chosen = format or next(name for name in _preferred() if name in found)
    if chosen not in found:
        there = " and ".join(name for name in found if name in FORMATS) or "one model, no job's outputs"
        raise ConfigError(f"--format {chosen}: {path} has {there}; leave --format out")
    is_gguf = chosen in ("file", "gguf")
    return Source("gguf", first_shard(found[chosen])) if is_gguf else Source("directory", found[chosen])


def first_shard(path: Path) -> Path:
    """The file itself; raises ModelError for a shard that is not the first, and says which is."""
    match = _SHARD.fullmatch(path.name)
    if match and int(match[2]) != 1:
        first = path.with_name(f"{match[1]}-00001-of-{match[3]}.gguf")
        raise ModelError(f"{path} is shard {int(match[2])} of {int(match[3])}; give the first, {first}")
    return path


def gguf_facts(path: Path) -> GgufFacts:
    """What a GGUF file with all its shards says of itself, from their heads alone.

    Raises:
        ModelError: for a file that is missing, broken, or holds no model.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            metadata = read_header(data).metadata
            values = {key: metadata[key].value for key in metadata if not key.startswith("tokenizer.ggml.")}
    except (BrokenHeaderError, ValueError) as exc:  # ValueError: mmap takes no empty file
        raise ModelError(f"{path} is no whole GGUF file: {exc}; copy it again") from exc
    length = values.get(f"{values.get('general.architecture')}.context_length")
    if not isinstance(length, int) or values.get("general.type") == _IMATRIX:
        raise ModelError(f"{path} holds no language model; a GGUF file with one was wanted")
    shards = _shards(path, int(values.get("split.count", 1)))
    return GgufFacts(
        length, bool(values.get("tokenizer.chat_template")), sum(shard.stat().st_size for shard in shards)
    )


def _shards(path: Path, count: int) -> list[Path]:
    match = _SHARD.fullmatch(path.name)
    if match is None or count <= 1:
        return [path]
    shards = [path.with_name(f"{match[1]}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]
    missing = next((shard for shard in shards if not shard.is_file()), None)
    if missing:
        raise ModelError(f"{missing} is missing, {path} has {count} shards; put all in one directory")
    return shards


def _preferred() -> tuple[str, ...]:
    """Names of what a directory may hold, best first."""
    return ("file", "model", *(("gguf", "exl2") if shared_library() else ("exl2", "gguf")))


def _in_directory(path: Path) -> dict[str, Path]:
    """By format, what a directory holds; what is a model directory itself is `model`."""
    if (path / "config.json").is_file():
        return {"model": path}
    outputs = {"exl2": path / "exl2"} if (path / "exl2" / "config.json").is_file() else {}
    place = path / "gguf" if (path / "gguf").is_dir() else path
    files = [file for file in sorted(place.glob("*.gguf")) if _begins(file)]
    if len(files) > 1:
        raise ModelError(f"{place} holds {', '.join(file.name for file in files)}; give one of these files")
    return {**outputs, "gguf": files[0]} if files else outputs


def _begins(file: Path) -> bool:
    match = _SHARD.fullmatch(file.name)
    return match is None or int(match[2]) == 1
