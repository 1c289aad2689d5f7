"""A GGUF file made of another: its tensors rounded to the types of a recipe, weighted with importance."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from exlq.errors import ConfigError, FormatError, ModelError
from exlq.formats.gguf import imatrix as imatrices
from exlq.formats.gguf.imatrix import Imatrix
from exlq.formats.gguf.overrides import parse_overrides
from exlq.formats.gguf.reader import GgufFile
from exlq.formats.gguf.recipes import recipe_named
from exlq.formats.gguf.shards import shard_paths, tensors_by_shard, without_number
from exlq.formats.gguf.values import KeyValue, TensorInfo
from exlq.formats.gguf.writer import GgufWriter, Split, file_bytes, tensor_bytes
from exlq.formats.gguf_blocks import BLOCK_TYPES
from exlq.pipeline import verify
from exlq.pipeline.progress import Progress
from exlq.pipeline.requantize_metadata import carried, imatrix_entries, parse_override_kv
from exlq.pipeline.requantize_tensors import settled, write_rows
from exlq.pipeline.requantize_types import Wishes, require_sense, wanted_types
from exlq.workspace import Workspace

COPY = "COPY"
MAPPED_BYTES = 1 << 26  # of a finished tensor, from which on it is in a file until it is written
NAMED_AT_MOST = 3  # tensors that a note names


@dataclass(frozen=True)
class Request:
    """What `exlq quantize` is asked for; `type` is a recipe as `recipe_named` takes it, or COPY."""

    source: Path  # of a split file the first shard
    target: Path
    type: str
    imatrix: Path | None = None
    include: tuple[str, ...] = ()  # parts of the names of imatrix entries
    exclude: tuple[str, ...] = ()
    tensor_types: tuple[str, ...] = ()  # REGEX=TYPE
    output_tensor_type: str | None = None
    token_embedding_type: str | None = None
    pure: bool = False
    leave_output: bool = False
    allow_requantize: bool = False
    split_bytes: int | None = None
    keep_split: bool = False
    override_kv: tuple[str, ...] = ()  # KEY=TYPE:VALUE
    search: str = "best"  # a key of `fit.SEARCHES`


@dataclass(frozen=True)
class Requantization:
    """Everything that is settled before a byte is written."""

    request: Request
    file: GgufFile
    imatrix: Imatrix | None
    metadata: tuple[KeyValue, ...]
    tensors: tuple[TensorInfo, ...]  # as they will be
    split: Split  # as the writer takes it
    n_bytes: int  # of all shards
    notes: tuple[str, ...]

    @property
    def bits_per_weight(self) -> float:
        """Of the whole file, metadata and all."""
        return 8 * self.n_bytes / sum(prod(info.shape) for info in self.tensors)


@contextmanager
def prepared(request: Request) -> Iterator[Requantization]:
    """Opens the input and settles types and sizes; of the weights only samples are read.

    Raises:
        InputError: of the kind that fits, for whatever cannot work.
    """
    _require_places(request)
    try:
        file = GgufFile(request.source)
    except FormatError as exc:
        raise ModelError(str(exc)) from exc
    with file:
        _require_other(request, file)
        yield _settle(request, file)


def run(job: Requantization, progress: Progress) -> tuple[Path, ...]:
    """Writes the file beside its place, reads it again and puts it there; the paths of its shards.

    Raises:
        ModelError: naming the tensor, for weights that are not finite or too large for their type.
        VerifyError: if what was written is not what was meant.
    """
    target = job.request.target
    _require_disk(job)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.", suffix=".part") as beside:
        paths, digests = _written(job, Path(beside), progress)
        verify.verify_gguf(paths, {info.name: info.type for info in job.tensors}, digests)
        return tuple(path.replace(target.parent / path.name) for path in paths)


def _settle(request: Request, file: GgufFile) -> Requantization:
    recipe = None if request.type.upper() == COPY else recipe_named(request.type)
    overrides = parse_overrides(
        request.tensor_types, request.output_tensor_type, request.token_embedding_type
    )
    wishes = Wishes(
        recipe,
        overrides,
        pure=request.pure,
        leave_output=request.leave_output,
        allow_requantize=request.allow_requantize,
        imatrix=request.imatrix is not None,
    )
    require_sense(wishes)
    imatrix = _imatrix(request)
    sources = tuple(file.tensors.values())
    types = wanted_types(sources, file.metadata, wishes)
    tensors = tuple(replace(info, type=settled(file, info, types[info.name])) for info in sources)
    notes = [*_retyped(tensors, types), *_unweighted(file, tensors, imatrix)]
    changed = parse_override_kv(request.override_kv)
    if imatrix is not None and request.imatrix is not None:
        changed = [*imatrix_entries(request.imatrix, imatrix), *changed]
    metadata = tuple(carried(file.metadata, None if recipe is None else recipe.file_type, changed))
    split = tensors_by_shard(file) if request.keep_split else request.split_bytes
    try:
        size = file_bytes(metadata, tensors, split)
    except FormatError as exc:
        raise ModelError(f"{request.source}: {exc}") from exc
    return Requantization(request, file, imatrix, metadata, tensors, split, size, tuple(notes))


def _imatrix(request: Request) -> Imatrix | None:
    """The importance matrix with the entries asked for."""
    if request.imatrix is None:
        return None
    found = imatrices.load(request.imatrix)
    kept = {
        name: entry
        for name, entry in found.entries.items()
        if not any(part in name for part in request.exclude)
        and (not request.include or any(part in name for part in request.include))
    }
    if not kept:
        raise ConfigError(
            f"none of the {len(found.entries)} entries of {request.imatrix} is left by --include-weights or "
            "--exclude-weights; give other parts of names"
        )
    return replace(found, entries=kept)


def _retyped(tensors: Sequence[TensorInfo], wanted: dict[str, str]) -> Iterator[str]:
    for info in tensors:
        if info.type != wanted[info.name]:
            found = f"its weights are too small or too large for {wanted[info.name]}"
            yield f"{info.name} becomes {info.type}: {found}"


def _unweighted(file: GgufFile, tensors: Sequence[TensorInfo], imatrix: Imatrix | None) -> list[str]:
    """One line about the tensors without an entry; all entries are held against their tensors here."""
    if imatrix is None:
        return []
    rounded = [
        info for info in tensors if info.type in BLOCK_TYPES and info.type != file.tensors[info.name].type
    ]
    missing = [info.name for info in rounded if imatrix.importance_for(info.name, info.shape) is None]
    if rounded and len(missing) == len(rounded):
        raise ModelError(
            f"the importance matrix has no entry for {missing[0]} or another of the {len(missing)} tensors "
            "to be rounded; use one made for this model"
        )
    if not missing:
        return []
    more = f" and {len(missing) - NAMED_AT_MOST} more" if len(missing) > NAMED_AT_MOST else ""
    named = ", ".join(missing[:NAMED_AT_MOST]) + more
    return [
        f"{len(missing)} of {len(rounded)} tensors have no importance and count all inputs alike: {named}"
    ]


def _written(
    job: Requantization, directory: Path, progress: Progress
) -> tuple[tuple[Path, ...], dict[str, str]]:
    """The paths of all shards and the digest of every tensor's bytes."""
    path, workspace = directory / job.request.target.name, Workspace(directory)
    writer = GgufWriter(path, job.metadata, job.tensors, job.split)
    digests = {}
    try:
        for done, info in enumerate(job.tensors, 1):
            data = _data(job, info, workspace)
            writer.add(info.name, data)
            digests[info.name] = hashlib.sha256(data.numpy().data).hexdigest()
            del data
            workspace.remove("tensor")
            progress("writing", done, len(job.tensors))
        return tuple(writer.close()), digests
    except BaseException:
        writer.abandon()
        raise


def _data(job: Requantization, info: TensorInfo, workspace: Workspace) -> Tensor:
    """The bytes of a finished tensor, mapped from a file if they are many."""
    source = job.file.tensors[info.name]
    n_bytes, n_rows = tensor_bytes(info), prod(info.shape[:-1])
    shape = (n_rows, n_bytes // n_rows)
    small = n_bytes < MAPPED_BYTES
    place = torch.empty(shape, dtype=torch.uint8) if small else workspace.tensor("tensor", shape, torch.uint8)
    rounded = info.type in BLOCK_TYPES and info.type != source.type
    importance = (
        job.imatrix.importance_for(info.name, info.shape) if job.imatrix is not None and rounded else None
    )
    write_rows(job.file, source, info.type, importance, job.request.search, place)
    return place.flatten()


def _require_places(request: Request) -> None:
    if request.include and request.exclude:
        raise ConfigError("--include-weights and --exclude-weights exclude one another: give one of them")
    if (request.include or request.exclude) and request.imatrix is None:
        raise ConfigError("--include-weights and --exclude-weights pick from --imatrix FILE: give it too")
    if request.keep_split and request.split_bytes is not None:
        raise ConfigError("--keep-split and --split-size exclude one another: give one of them")
    if not request.target.parent.is_dir():
        raise ConfigError(
            f"{request.target}: there is no directory {request.target.parent}; make it or choose another"
        )
    if request.target.is_dir():
        raise ConfigError(f"{request.target} is a directory; give the name of a file")


def _require_other(request: Request, file: GgufFile) -> None:
    """Refuses to write over the input, or one of its shards."""
    sources, target = shard_paths(file), request.target
    splits = request.keep_split or request.split_bytes is not None
    whole = without_number(request.source).resolve()
    same_shards = len(sources) > 1 and splits and target.resolve() == whole
    if same_shards or target.resolve() in [path.resolve() for path in sources]:
        raise ConfigError(f"{target} is the input; choose another name for the output")


def _require_disk(job: Requantization) -> None:
    free = shutil.disk_usage(job.request.target.parent).free
    if free < job.n_bytes:
        raise ConfigError(
            f"{job.request.target.parent} has {free:,} bytes left, the file takes {job.n_bytes:,}; make room"
        )
