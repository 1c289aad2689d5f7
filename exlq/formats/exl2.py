"""One linear layer as the five EXL2 tensors, bit for bit as ExLlamaV2's kernels read them.

The packed matrix is the transpose of `nn.Linear`'s weight: rows are input channels, in the order of
`q_perm`, columns are output features padded to a multiple of 32. A group is a run of packed rows
that shares its width and its scales:

    multiplier = fp16(q_scale_max / 256)               one per group
    scale      = fp16((code + 1)² * multiplier)        4-bit code per group and column
    weight     = fp16((level - 2^(bits - 1)) * scale)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from exlq.errors import FormatError
from exlq.formats.exl2_options import WIDTHS
from exlq.numerics import bitpack
from exlq.types import Group

OUT_MULTIPLE = 32  # columns are padded to this
SUFFIXES = ("q_weight", "q_scale", "q_scale_max", "q_groups", "q_invperm")


def padded_out_features(out_features: int) -> int:
    """Columns of the packed matrix."""
    return -(-out_features // OUT_MULTIPLE) * OUT_MULTIPLE


def storage_bits(groups: Sequence[Group], out_features: int) -> int:
    """Bits of the five stored tensors, padding counted, bias apart."""
    padded = padded_out_features(out_features)
    in_features = groups[-1].stop
    levels = sum(group.size * group.bits for group in groups) * padded
    per_group = 16 + 32 + 4 * padded  # q_scale_max, q_groups, q_scale
    return levels + per_group * len(groups) + 32 * in_features


def group_multiplier(q_scale_max: Tensor) -> Tensor:
    """fp16(q_scale_max / 256): the scale of code 0. Subnormal below 2⁻⁶, as the kernels have it."""
    return q_scale_max.half() * (1 / 256)


def group_scales(codes: Tensor, multiplier: Tensor) -> Tensor:
    """Scales as the kernels rebuild them.

    Args:
        codes: (groups, out) integers of any width in [0, 16).
        multiplier: (groups,) float16, from `group_multiplier`.

    Returns:
        (groups, out) float16.
    """
    squares = (codes.to(torch.int32) + 1).square().half()
    return squares * multiplier.unsqueeze(-1)


def pack_linear(
    levels: Tensor, codes: Tensor, q_scale_max: Tensor, groups: Sequence[Group], perm: Tensor
) -> dict[str, Tensor]:
    """The five stored tensors.

    Args:
        levels: (in_features, out_features) unsigned levels in packed row order.
        codes: (groups, out_features) scale codes in [0, 16).
        q_scale_max: (groups,) float16.
        groups: packed rows of each group, bits falling, sizes multiples of 32.
        perm: (in_features,) the original input channel of each packed row.
    """
    padding = padded_out_features(levels.shape[1]) - levels.shape[1]
    words, offsets, row = [], [], 0
    for group in groups:
        zero = 1 << (group.bits - 1)
        rows = torch.nn.functional.pad(levels[group.start : group.stop], (0, padding), value=zero)
        words.append(bitpack.pack_levels(rows, group.bits))
        offsets += [group.bits, row]
        row += len(words[-1])
    if row >= 1 << 15:
        raise FormatError(f"q_weight has {row} rows, EXL2 can address 32767: use fewer bits for this linear")
    return {
        "q_weight": torch.cat(words),
        "q_scale": bitpack.pack_nibbles(torch.nn.functional.pad(codes, (0, padding))),
        "q_scale_max": q_scale_max.half(),
        "q_groups": torch.tensor(offsets, dtype=torch.int16),
        "q_invperm": torch.argsort(perm).to(torch.int32),
    }


def stored_groups(tensors: Mapping[str, Tensor]) -> list[Group]:
    """The groups written in `q_groups`.

    Raises:
        FormatError: if a width is unknown, widths rise, or offsets do not fit `q_weight`.
    """
    pairs = tensors["q_groups"].to(torch.int64).reshape(-1, 2).tolist()
    ends = [offset for _, offset in pairs[1:]] + [len(tensors["q_weight"])]
    if not pairs or pairs[0][1] != 0:
        raise FormatError(f"q_groups begins with {pairs[:1]}: the first group starts at row 0 of q_weight")
    groups: list[Group] = []
    start = 0
    for (bits, offset), end in zip(pairs, ends, strict=True):
        rows, rest = divmod((end - offset) * 32, bits) if bits in WIDTHS else (0, 1)
        if rest or rows <= 0 or (groups and bits > groups[-1].bits):
            raise FormatError(f"q_groups has ({bits}, {offset}) before {end}: no valid EXL2 group")
        groups.append(Group(start, start + rows, bits))
        start += rows
    if start != len(tensors["q_invperm"]):
        raise FormatError(f"q_groups cover {start} input channels, q_invperm has {len(tensors['q_invperm'])}")
    return groups


def unpack_linear(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, list[Group]]:
    """Unsigned levels (in, padded out) in packed order, scale codes (groups, padded out), groups."""
    groups = stored_groups(tensors)
    words, row, levels = tensors["q_weight"], 0, []
    for group in groups:
        stop = row + group.size * group.bits // 32
        levels.append(bitpack.unpack_levels(words[row:stop], group.bits))
        row = stop
    return torch.cat(levels), bitpack.unpack_nibbles(tensors["q_scale"]), groups


def dequantize_linear(tensors: Mapping[str, Tensor]) -> Tensor:
    """The weight that ExLlamaV2 computes with.

    Args:
        tensors: `q_weight, q_scale, q_scale_max, q_groups, q_invperm` as stored.

    Returns:
        (padded out_features, in_features) float16, input channels in the model's order.

    Raises:
        FormatError: if the groups do not fit the tensors.
    """
    levels, codes, groups = unpack_linear(tensors)
    scales = group_scales(codes, group_multiplier(tensors["q_scale_max"]))
    packed = torch.empty(levels.shape, dtype=torch.float16, device=levels.device)
    for group, scale in zip(groups, scales, strict=True):
        rows = slice(group.start, group.stop)
        packed[rows] = (levels[rows] - (1 << (group.bits - 1))).half() * scale
    return packed[tensors["q_invperm"].to(torch.int64)].T.contiguous()
