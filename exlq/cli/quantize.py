"""`exlq quantize`: a GGUF file in, one of other types out."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from exlq.cli.screen import Screen
from exlq.errors import ConfigError
from exlq.formats.gguf.overrides import read_type_file
from exlq.formats.gguf.recipes import recipe_named
from exlq.formats.gguf.shards import without_number
from exlq.formats.gguf.types import BLOCKS
from exlq.formats.gguf.writer import tensor_bytes
from exlq.pipeline.requantize import COPY, Requantization, Request, prepared
from exlq.pipeline.requantize import run as requantize
from exlq.report import tables
from exlq.sizes import format_bytes, parse_bytes

TYPE_AT_END = re.compile(rf"[-.](?:{'|'.join(BLOCKS)})$", re.IGNORECASE)


def run(parsed: argparse.Namespace, screen: Screen) -> None:
    with prepared(_request(parsed)) as job:
        for note in job.notes:
            screen.tell(f"note: {note}")
        if parsed.dry_run:
            rows = [(info.name, info.type, tensor_bytes(info)) for info in job.tensors]
            screen.tell(tables.types_table(rows, job.n_bytes))
            screen.show(_size(job), {"bytes": job.n_bytes, "types": {name: kind for name, kind, _ in rows}})
            return
        paths = [str(path) for path in requantize(job, screen)]
        shown = "\n".join([*(f"file: {path}" for path in paths), _size(job)])
        screen.show(shown, {"paths": paths, "bytes": job.n_bytes, "bpw": job.bits_per_weight})


def _size(job: Requantization) -> str:
    made, given = format_bytes(job.n_bytes), format_bytes(job.file.n_bytes)
    return f"{made}, {job.bits_per_weight:.4f} bits per weight; the input has {given}"


def _request(parsed: argparse.Namespace) -> Request:
    source, target, kind = _places(parsed.arguments)
    splits = parsed.keep_split or parsed.split_size is not None
    from_file = [] if parsed.tensor_type_file is None else read_type_file(parsed.tensor_type_file)
    return Request(
        source=source,
        target=without_number(target) if splits else target,
        type=kind,
        imatrix=parsed.imatrix,
        include=tuple(parsed.include_weights),
        exclude=tuple(parsed.exclude_weights),
        tensor_types=(*parsed.tensor_type, *from_file),
        output_tensor_type=parsed.output_tensor_type,
        token_embedding_type=parsed.token_embedding_type,
        pure=parsed.pure,
        leave_output=parsed.leave_output_tensor,
        allow_requantize=parsed.allow_requantize,
        split_bytes=None if parsed.split_size is None else parse_bytes(parsed.split_size),
        keep_split=parsed.keep_split,
        override_kv=tuple(parsed.override_kv),
        search=parsed.search,
    )


def _places(arguments: Sequence[str]) -> tuple[Path, Path, str]:
    """Input, output and type of IN [OUT] TYPE [THREADS]; sets the threads, where they are given so."""
    if len(arguments) < 2:
        raise ConfigError(f"{' '.join(arguments)}: IN.gguf [OUT.gguf] TYPE [THREADS] are wanted")
    source = Path(arguments[0])
    at = 1 if _is_type(arguments[1]) else 2
    if len(arguments) not in (at + 1, at + 2):
        recipe_named(arguments[min(at, len(arguments) - 1)])
        raise ConfigError(f"{' '.join(arguments)}: IN.gguf [OUT.gguf] TYPE [THREADS] are wanted")
    kind = arguments[at].upper() if arguments[at].upper() == COPY else recipe_named(arguments[at]).name
    if len(arguments) == at + 2:
        torch.set_num_threads(_threads(arguments[at + 1]))
    return source, Path(arguments[1]) if at == 2 else _beside(source, kind), kind


def _beside(source: Path, kind: str) -> Path:
    """The input's name with the type in place of its own."""
    stem = TYPE_AT_END.sub("", without_number(source).stem)
    return source.with_name(f"{stem}-{kind}.gguf")


def _is_type(text: str) -> bool:
    try:
        return text.upper() == COPY or bool(recipe_named(text))
    except ConfigError:
        return False


def _threads(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"{text!r} threads: a whole number of at least 1 is wanted")
    return int(text)
