"""The job's directories: what is ours, what may be replaced, and how."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from exlq import faults
from exlq.errors import ConfigError
from exlq.files import atomic_write_json

MARK = "job.json"
FORMAT = "exlq-job"
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
_PART = re.compile(r"\..+\.(\d+\.part|removed)")  # what a killed process leaves of a file or a directory


def prepare_work(out_dir: Path, no_resume: bool) -> Path:
    """The directory for working files, made where it is missing.

    With `no_resume` an earlier one that holds anything is left beside it, as `work.old-N`.

    Raises:
        ConfigError: if something else stands in its place, or cannot be written to.
    """
    work = out_dir / "work"
    with writable(out_dir):
        if work.exists() and not _is_ours(work) and (not work.is_dir() or _holds(work)):
            raise ConfigError(f"{work} is not a work directory of exlq: move it away or choose another -o")
        if no_resume and work.exists() and _holds(work):
            work.rename(next(p for p in _old_places(out_dir) if not p.exists()))
        work.mkdir(parents=True, exist_ok=True)
        if not _is_ours(work):
            atomic_write_json(work / MARK, {"format": FORMAT, "version": 0})
    return work


@contextmanager
def writable(out_dir: Path) -> Iterator[None]:
    """Makes a ConfigError of an error of the system."""
    try:
        yield
    except OSError as exc:
        raise ConfigError(f"{out_dir} cannot be written to ({exc.strerror}): choose another -o") from exc


def _old_places(out_dir: Path) -> Iterator[Path]:
    return (out_dir / f"work.old-{number}" for number in itertools.count(1))


def _holds(work: Path) -> bool:
    """Whether there is anything but the mark, or what is left of writing it."""
    return any(path.name != MARK and not _PART.fullmatch(path.name) for path in work.iterdir())


def holds_work(work: Path) -> bool:
    """Whether an earlier run has left anything that could be gone on with."""
    return _is_ours(work) and _holds(work)


def sweep_parts(work: Path, *files: Path) -> None:
    """Removes what a killed process has left of files of the work directory, and of the `files` given."""
    parts = [path for path in work.rglob(".*") if _PART.fullmatch(path.name)]
    for file in files:
        pattern = re.compile(re.escape(f".{file.name}.") + r"\d+\.part")
        parts += [path for path in file.parent.glob(".*.part") if pattern.fullmatch(path.name)]
    for path in parts:
        _remove(path)


def tidy(work: Path, names: Iterable[str]) -> None:
    """Removes working files that have served, by name; the directory itself tells that it is ours."""
    for name in names:
        for path in sorted(work.glob(name)):
            discard(path)


def discard(path: Path) -> None:
    """Removes a file, or a directory at once: a part of it is never taken for the whole."""
    doomed = path.with_name(f".{path.name}.removed")
    _remove(doomed)
    if path.exists():
        path.rename(doomed)
        faults.point("discarding")
        _remove(doomed)


def old_work(out_dir: Path) -> list[Path]:
    """What `no_resume` has left beside the work directory."""
    return [path for path in sorted(out_dir.glob("work.old-*")) if _is_ours(path)]


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def require_replaceable(target: Path) -> None:
    """Refuses to put a model where something of somebody else's stands.

    Raises:
        ConfigError: if `target` holds anything but a model written by exlq.
    """
    if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not _is_our_model(target))):
        raise ConfigError(
            f"{target} exists and was not written by exlq: move it away or choose another place"
        )


def require_parent(file: Path, out_dir: Path) -> None:
    """Refuses a measurement's file whose directory is missing, and is not the job's, which will be made.

    Raises:
        ConfigError: naming the directory.
    """
    if not file.parent.is_dir() and file.parent.resolve() != out_dir.resolve():
        raise ConfigError(f"-om {file}: there is no directory {file.parent}; make it or choose another")


def put_in_place(finished: Path, target: Path) -> None:
    """Moves a finished directory to `target`; one of ours that stands there goes only then."""
    require_replaceable(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    finished = _beside(finished, target)
    replaced = target.with_name(f".{target.name}.exlq-old")
    if target.exists():
        _remove(replaced)
        target.rename(replaced)
    faults.point("place empty")
    finished.replace(target)
    faults.point("place taken")
    _remove(replaced)


def require_directory(target: Path) -> None:
    """Refuses to put files where something else than a directory stands.

    Raises:
        ConfigError: if so.
    """
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{target} exists and is no directory: move it away or choose another -o")


def put_files_in_place(finished: Path, target: Path) -> list[Path]:
    """Moves all files of `finished` into `target`, each in the place of its namesake; where they are now.

    Shards of an earlier file of the same name, of which there were more or fewer, go.
    """
    require_directory(target)
    target.mkdir(parents=True, exist_ok=True)
    beside = _beside(finished, target / "files")
    first, *others = sorted(beside.iterdir(), key=_by_shard)
    if _SHARD.search(first.stem):
        (target / first.name).unlink(missing_ok=True)  # nobody opens others' shards behind it
    moved = []
    for path in (*reversed(others), first):
        faults.point("place file")
        moved.append(path.replace(target / path.name))
    stems = {_SHARD.sub("", path.stem) for path in moved if path.suffix == ".gguf"}
    for path in target.glob("*.gguf"):
        if path not in moved and _SHARD.sub("", path.stem) in stems:
            path.unlink()
    shutil.rmtree(beside)
    return sorted(moved)


def _by_shard(path: Path) -> tuple[bool, str]:
    """The first shard before all, by which readers open the file."""
    return path.suffix != ".gguf", path.name


def _beside(finished: Path, target: Path) -> Path:
    """The directory on the file system of `target`, so that it can take that name at once."""
    if finished.stat().st_dev == target.parent.stat().st_dev:
        return finished
    part = target.with_name(f".{target.name}.exlq-part")
    if part.exists():
        shutil.rmtree(part)
    shutil.copytree(finished, part)
    faults.point("copied beside")
    shutil.rmtree(finished)
    return part


def _is_ours(work: Path) -> bool:
    try:
        return bool(json.loads((work / MARK).read_text(encoding="utf-8"))["format"] == FORMAT)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _is_our_model(directory: Path) -> bool:
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        return "exlq" in config["quantization_config"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
