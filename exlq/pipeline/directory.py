"""The job's directories: what is ours, what may be replaced, and how."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from exlq.errors import ConfigError
from exlq.files import atomic_write_json

MARK = "job.json"
_FORMAT = "exlq-job"
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")


def prepare_work(out_dir: Path, no_resume: bool) -> Path:
    """The directory for working files, made where it is missing.

    Raises:
        ConfigError: if something else stands in its place, or cannot be written to.
    """
    work = out_dir / "work"
    if work.exists() and not _is_ours(work) and (not work.is_dir() or any(work.iterdir())):
        raise ConfigError(f"{work} is not a work directory of exlq: move it away or choose another -o")
    try:
        if no_resume and work.exists():
            shutil.rmtree(work)
        work.mkdir(parents=True, exist_ok=True)
        atomic_write_json(work / MARK, {"format": _FORMAT, "version": 1})
    except OSError as exc:
        raise ConfigError(f"{out_dir} cannot be written to ({exc.strerror}): choose another -o") from exc
    return work


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


def put_in_place(finished: Path, target: Path, work: Path) -> None:
    """Moves a finished directory to `target`; one of ours that stands there goes only then."""
    require_replaceable(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    finished = _beside(finished, target)
    replaced = work / "replaced"
    if replaced.exists():
        shutil.rmtree(replaced)
    if target.exists():
        shutil.move(target, replaced)
    finished.replace(target)
    if replaced.exists():
        shutil.rmtree(replaced)


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
    moved = [path.replace(target / path.name) for path in sorted(beside.iterdir())]
    stems = {_SHARD.sub("", path.stem) for path in moved if path.suffix == ".gguf"}
    for path in target.glob("*.gguf"):
        if path not in moved and _SHARD.sub("", path.stem) in stems:
            path.unlink()
    shutil.rmtree(beside)
    return moved


def _beside(finished: Path, target: Path) -> Path:
    """The directory on the file system of `target`, so that it can take that name at once."""
    if finished.stat().st_dev == target.parent.stat().st_dev:
        return finished
    part = target.with_name(f".{target.name}.exlq-part")
    if part.exists():
        shutil.rmtree(part)
    shutil.copytree(finished, part)
    shutil.rmtree(finished)
    return part


def _is_ours(work: Path) -> bool:
    try:
        return bool(json.loads((work / MARK).read_text(encoding="utf-8"))["format"] == _FORMAT)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _is_our_model(directory: Path) -> bool:
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        return "exlq" in config["quantization_config"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
