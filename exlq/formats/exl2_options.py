"""The ways exlq may store a linear as EXL2, and the arithmetic of a way's groups."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from exlq.errors import FormatError
from exlq.types import Group, Option

WIDTHS = (8, 6, 5, 4, 3, 2)  # bits a group may have; groups are stored in falling order
SCALE_BITS = 4

# (share of the first width, widths, group size), fewest bits first. On the size-error front of trained
# models nearly all of these have 32 channels a group; wider groups serve where a few bits are short.
_TABLE: tuple[tuple[float, tuple[int, ...], int], ...] = (
    (1, (2,), 128),
    (1, (2,), 64),
    (0.05, (3, 2), 32),
    (0.25, (3, 2), 64),
    (0.5, (3, 2), 64),
    (0.75, (3, 2), 32),
    (1, (3,), 128),
    (1, (3,), 64),
    (1, (3,), 32),
    (0.1, (4, 3), 32),
    (0.25, (4, 3), 32),
    (0.5, (4, 3), 32),
    (0.75, (4, 3), 32),
    (1, (4,), 128),
    (1, (4,), 64),
    (1, (4,), 32),
    (0.1, (5, 4), 32),
    (0.25, (5, 4), 32),
    (0.5, (5, 4), 32),
    (0.75, (5, 4), 32),
    (1, (5,), 64),
    (1, (5,), 32),
    (0.1, (6, 5), 32),
    (0.5, (6, 5), 32),
    (1, (6,), 64),
    (1, (6,), 32),
    (0.1, (8, 6), 32),
    (0.5, (8, 6), 32),
    (1, (8,), 128),
    (1, (8,), 32),
)

# What `-hb` asks for, by the nominal bits of the head.
_HEAD: Mapping[int, tuple[float, tuple[int, ...], int]] = {
    2: (0.3, (4, 2), 32),
    3: (0.15, (4, 3), 32),
    4: (0.15, (6, 4), 32),
    5: (0.15, (6, 5), 32),
    6: (0.15, (8, 6), 32),
    8: (1, (8,), 32),
}


def _option(share: float, bits: tuple[int, ...], group_size: int) -> Option:
    shares = [share] if len(bits) == 1 else [share, round(1 - share, 4)]
    mix = "/".join(f"{p:g}:{b}b" for p, b in zip(shares, bits, strict=True))
    qparams = {"group_size": group_size, "bits": list(bits), "bits_prop": shares, "scale_bits": SCALE_BITS}
    return Option(f"{mix} {group_size}g s{SCALE_BITS}", qparams)


OPTIONS = tuple(_option(*row) for row in _TABLE)
HEAD_OPTIONS = {bits: _option(*row) for bits, row in _HEAD.items()}


def groups_of(qparams: Mapping[str, Any], in_features: int) -> list[Group]:
    """The groups of `in_features` packed rows under an option's parameters.

    Args:
        qparams: `group_size` (a number, or one per width), `bits` falling, `bits_prop` adding up to 1.

    Raises:
        FormatError: if the widths are not EXL2's, or rows are left over.

    Source: the row counts of exllamav2 0.3.2: shares rounded up to whole groups, the rest to the last width.
    """
    try:
        bits, shares = qparams["bits"], qparams["bits_prop"]
        _check(bits, shares, in_features)
        sizes = [_group_size(qparams["group_size"], width) for width in bits]
    except (KeyError, TypeError) as exc:
        raise FormatError(f"{dict(qparams)} are no parameters of an EXL2 option") from exc
    groups: list[Group] = []
    start = 0
    for width, share, size in zip(bits, shares, sizes, strict=True):
        for _ in range(math.ceil(min(in_features * share, in_features - start) / size)):
            groups.append(Group(start, min(start + size, in_features), width))
            start = groups[-1].stop
    if start < in_features:
        raise FormatError(f"shares {shares} leave {in_features - start} of {in_features} rows without bits")
    return groups


def _group_size(group_size: int | Mapping[Any, int], width: int) -> int:
    size = group_size
    if isinstance(group_size, Mapping):
        size = group_size[str(width)] if str(width) in group_size else group_size[width]
    if not isinstance(size, int) or size < 32 or size % 32:
        raise FormatError(f"groups of {size!r}: EXL2 takes multiples of 32")
    return size


def _check(bits: Sequence[int], shares: Sequence[float], in_features: int) -> None:
    if not set(bits) <= set(WIDTHS) or list(bits) != sorted(bits, reverse=True) or len(bits) != len(shares):
        raise FormatError(f"bits {list(bits)} with shares {list(shares)}: EXL2 has widths {WIDTHS}, falling")
    if not all(0 <= share <= 1 for share in shares):
        raise FormatError(f"shares {list(shares)}: each is wanted from 0 to 1")
    if in_features % 32:
        raise FormatError(f"{in_features} input features: EXL2 needs a multiple of 32")
