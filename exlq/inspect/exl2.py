"""What an EXL2 directory holds, from the headers of its files and the few bytes of `q_groups`."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from exlq.errors import ModelError
from exlq.formats.exl2_options import WIDTHS
from exlq.inspect.measured import chosen
from exlq.inspect.model import SETTINGS, entries_of
from exlq.inspect.record import Entry, Inspection
from exlq.inspect.safetensors import Stored, read_headers
from exlq.models.config import read_json
from exlq.models.layout import HEAD_KEY
from exlq.sizing.shapes import read_shape

MEMBERS = ("q_weight", "q_scale", "q_scale_max", "q_groups", "q_invperm")
DERIVED = ("q_perm", "q_group_map")  # in files of others; counted to no linear
MARK = ".q_weight"


def is_exl2(directory: Path) -> bool:
    """Whether the headers of a directory list a linear in EXL2."""
    return any(name.endswith(MARK) for name in read_headers(sorted(directory.glob("*.safetensors"))))


def inspect_exl2(directory: Path) -> Inspection:
    """Every linear with its bits, and its error and sensitivity where exlq's job is beside it.

    Raises:
        ModelError: for files that are not whole, or linears that break the rules of the format.
    """
    config = read_json(directory)
    stored = read_headers(sorted(directory.glob("*.safetensors")))
    keys = [name.removesuffix(MARK) for name in stored if name.endswith(MARK)]
    rows = _out_features(directory)
    linears = [_linear(directory, key, stored, rows.get(key)) for key in keys]
    linears, notes = _with_figures(linears, directory)
    hidden = {f"{key}.{suffix}" for key in keys for suffix in (*MEMBERS, *DERIVED)}
    plain = entries_of({name: tensor for name, tensor in stored.items() if name not in hidden})
    decoder = [entry for entry in linears if entry.name != HEAD_KEY]
    bits = sum(8 * (entry.n_bytes or 0) for entry in decoder)
    made = config.get("quantization_config")
    facts = {
        "architecture": str(config.get("architectures")).strip("[]'"),
        "bits per weight": round(bits / max(1, sum(entry.weights for entry in decoder)), 4),
        "linears": len(linears),
        "bytes": sum(tensor.n_bytes for tensor in stored.values()),
        "files": len({tensor.path for tensor in stored.values()}),
        **(dict(_made(made)) if isinstance(made, dict) else {}),
        **{name: config[key] for name, key in SETTINGS.items() if config.get(key) is not None},
    }
    metadata = made if isinstance(made, dict) else {}
    return Inspection(str(directory), "exl2", facts, (*linears, *plain), notes, metadata)


def _made(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """How it was made, as config.json has it."""
    for told, key in (("asked bits", "bits"), ("head bits", "head_bits"), ("exlq", "exlq")):
        if key in settings:
            yield told, settings[key]
    if isinstance(calibration := settings.get("calibration"), dict):
        yield "calibration", ", ".join(f"{name} {value}" for name, value in calibration.items())


def _out_features(directory: Path) -> dict[str, int]:
    """Output features without padding, where the family is known."""
    try:
        shape = read_shape(directory)
    except ModelError:
        return {}
    return {spec.key: spec.out_features for spec in (*shape.linears, shape.head)}


def _linear(directory: Path, key: str, stored: Mapping[str, Stored], rows: int | None) -> Entry:
    missing = [suffix for suffix in MEMBERS if f"{key}.{suffix}" not in stored]
    if missing:
        raise ModelError(f"{directory}: {key}.{missing[0]} is missing beside {key}{MARK}")
    members = {suffix: stored[f"{key}.{suffix}"] for suffix in MEMBERS}
    if len(members["q_weight"].shape) != 2 or any(
        len(members[s].shape) != 1 for s in ("q_groups", "q_invperm")
    ):
        raise ModelError(f"{directory}: {key} is not stored as EXL2 linears are; copy it again")
    columns, in_features = members["q_weight"].shape[1], members["q_invperm"].shape[0]
    padded = rows is not None and 0 <= columns - rows < 32
    out_features = rows if padded and rows is not None else columns
    n_bytes = sum(member.n_bytes for member in members.values())
    weights = in_features * out_features
    if not weights:
        raise ModelError(f"{directory}: {key} holds no weights; copy it again")
    return Entry(
        name=key,
        type=_mix(directory, key, members),
        shape=(out_features, in_features),
        weights=weights,
        bits=8 * n_bytes / weights,
        n_bytes=n_bytes,
    )


def _mix(directory: Path, key: str, members: Mapping[str, Stored]) -> str:
    """Shares of the widths and the size of a group, as `0.1:4b/0.9:3b 32g`."""
    groups, in_features = members["q_groups"], members["q_invperm"].shape[0]
    if groups.dtype != "I16" or groups.shape[0] % 2 or not groups.shape[0]:
        raise ModelError(f"{directory}: {key}.q_groups is {groups.dtype} {groups.shape}, no pairs of I16")
    pairs = list(struct.iter_unpack("<HH", groups.read()))
    ends = [offset for _, offset in pairs[1:]] + [members["q_weight"].shape[0]]
    channels: Counter[int] = Counter()
    sizes: Counter[int] = Counter()
    for (bits, offset), end in zip(pairs, ends, strict=True):
        size, rest = divmod((end - offset) * 32, bits) if bits in WIDTHS else (0, 1)
        if rest or size <= 0:
            raise ModelError(
                f"{directory}: {key}.q_groups has ({bits}, {offset}) before {end}; copy it again"
            )
        channels[bits] += size
        sizes[size] += 1
    if sum(channels.values()) != in_features:
        raise ModelError(
            f"{directory}: {key}.q_groups covers {sum(channels.values())} of {in_features} channels"
        )
    shares = "/".join(f"{round(n / in_features, 2):g}:{bits}b" for bits, n in channels.items())
    return f"{shares} {sizes.most_common(1)[0][0]}g"


def _with_figures(entries: list[Entry], directory: Path) -> tuple[list[Entry], tuple[str, ...]]:
    """Errors of a job beside it, if that is what made this directory: its options have these sizes."""
    found, notes = chosen(directory.absolute().parent, "exl2")
    agree = all(
        entry.name not in found or found[entry.name][1].total_bits == 8 * (entry.n_bytes or 0)
        for entry in entries
    )
    if not agree:
        return entries, ("the measurement beside it is of another model, so errors are not shown",)
    return [
        replace(
            entry,
            type=found[entry.name][1].desc,
            error=found[entry.name][1].err,
            loss=found[entry.name][1].loss,
            sensitivity=found[entry.name][0].sensitivity,
        )
        if entry.name in found
        else entry
        for entry in entries
    ], notes
