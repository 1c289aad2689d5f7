"""Which files of a directory hold the weights, and which of them each tensor is to come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from exlq.errors import ModelError
from exlq.files import read_json

SAFETENSORS = ".safetensors"
PICKLES = (".bin", ".pt", ".pth")
MOST_HEADER_BYTES = 16_000_000  # of a safetensors file; those of the largest models have a tenth
_INDEX = ".index.json"
_TRAINING_STATE = ("training_args", "optimizer", "scheduler", "rng_state", "scaler")


@dataclass(frozen=True)
class WeightFiles:
    """The files that hold the weights; `index` and `promised` (tensor → file name) where they are sharded."""

    directory: Path
    names: tuple[str, ...]
    index: str | None = None
    promised: Mapping[str, str] | None = None


def find_weight_files(directory: Path) -> WeightFiles:
    """The weight files, in the order of preference transformers has: safetensors first, one file first.

    Raises ModelError for a missing directory, no weights, or an index that cannot be followed.
    """
    if not directory.is_dir():
        raise ModelError(
            f"{directory} is not a directory; give the folder that holds config.json and the weights"
        )
    for stem in ("model.safetensors", "pytorch_model.bin"):
        if (directory / stem).is_file():
            return WeightFiles(directory, (stem,))
        if (directory / (stem + _INDEX)).is_file():
            return _from_index(directory, stem + _INDEX)
    return _from_listing(directory)


def header_bytes(path: Path) -> int:
    """Length of a safetensors file's header, which is JSON and begins at byte 8.

    Raises ModelError where it does not fit into the file, or into memory when it is parsed.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
    except OSError as exc:
        raise ModelError(f"{path} cannot be read: {exc.strerror}") from exc
    if size < 8 or length > min(size - 8, MOST_HEADER_BYTES):
        raise ModelError(
            f"{path} is not a whole safetensors file: a header of {length:,} bytes does not fit into its "
            f"{size:,}, or is above {MOST_HEADER_BYTES:,}; download it again"
        )
    return length


def _from_listing(directory: Path) -> WeightFiles:
    names = sorted(path.name for path in directory.iterdir() if path.is_file())
    indexes = [name for name in names if name.endswith(tuple(s + _INDEX for s in (SAFETENSORS, *PICKLES)))]
    if len(indexes) > 1:
        raise ModelError(f"{directory} has {len(indexes)} weight indexes ({', '.join(indexes)}); keep one")
    if indexes:
        return _from_index(directory, indexes[0])
    tensors = tuple(name for name in names if name.endswith(SAFETENSORS))
    pickles = (name for name in names if name.endswith(PICKLES) and not name.startswith(_TRAINING_STATE))
    found = tensors or tuple(pickles)
    if not found:
        raise ModelError(f"no weights in {directory}; wanted *.safetensors, *.bin, *.pt or *.pth")
    return WeightFiles(directory, found)


def _from_index(directory: Path, index: str) -> WeightFiles:
    path = directory / index
    promised = _weight_map(path)
    for name in set(promised.values()):
        _require_inside(path, name)
        if not (directory / name).is_file():
            raise ModelError(f"{path} names the shard {name}, which is not there; download it again")
    return WeightFiles(directory, tuple(sorted(set(promised.values()))), index, promised)


def _weight_map(path: Path) -> dict[str, str]:
    try:
        content = read_json(path)
    except ValueError as exc:
        reason = " ".join(str(exc).split())
        raise ModelError(f"{path} is not JSON ({reason}); download it again") from exc
    promised = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(promised, dict) or not all(isinstance(name, str) for name in promised.values()):
        raise ModelError(f"{path} has no weight_map of tensor names to file names")
    if not promised:
        raise ModelError(f"{path} has an empty weight_map; wanted the names of the weights")
    return promised


def _require_inside(path: Path, name: str) -> None:
    """Refuse by spelling alone: a file inside may well be a link, as in a download cache."""
    for kind in (PurePosixPath, PureWindowsPath):
        pure = kind(name)
        if pure.is_absolute() or pure.anchor or ".." in pure.parts or not pure.parts:
            raise ModelError(
                f"{path} names the shard {name!r}, which is outside {path.parent}; wanted a file in it"
            )
    if not name.endswith((SAFETENSORS, *PICKLES)):
        raise ModelError(f"{path} names the shard {name!r}; wanted a .safetensors, .bin, .pt or .pth file")
