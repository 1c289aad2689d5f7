"""One tensor of a GGUF file in another type, a slab of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

from exlq.errors import FormatError, ModelError
from exlq.formats.gguf.reader import GgufFile
from exlq.formats.gguf.values import TensorInfo
from exlq.formats.gguf_blocks import BLOCK_TYPES, FLOAT_TYPES, TYPES
from exlq.formats.gguf_blocks.fit import SAMPLED_ROWS, TOLERATED_LOSS, fit, underflows

SLAB_WEIGHTS = 1 << 22  # that are float32 at once
SAMPLED_MATRICES = 16
# What a type gives way to where weights are too small for its float16 steps, before they stay as they are.
WIDER = ("Q8_0", "F16")
LOST_IN_HALF = 1e-4  # of the sum of squares, about what Q8_0 loses of weights of a common size


def write_rows(
    file: GgufFile, info: TensorInfo, type: str, importance: Tensor | None, search: str, place: Tensor
) -> None:
    """Fills `place` with the tensor's rows, rounded to `type`, or as they are where it has that type.

    Args:
        info: of the tensor in `file`.
        importance: (in_features,), or (n_mat, in_features) for experts; None where all inputs count alike.
        search: a key of `fit.SEARCHES`.
        place: (rows, row bytes) uint8, all matrices one below the other. Modified.

    Raises:
        ModelError: naming the tensor, for a weight that is not finite or too large for `type`.
    """
    by_matrix = None if importance is None else importance.reshape(-1, info.shape[-1])
    begin = 0
    for matrix, stored in slabs(file, info):
        if type != info.type:
            factors = None if by_matrix is None else by_matrix[matrix]
            try:
                stored = _rounded(type, TYPES[info.type].unpack(stored), factors, search)
            except FormatError as exc:
                raise ModelError(f"{info.name}: {exc}") from exc
        place[begin : begin + len(stored)] = stored
        begin += len(stored)


def slabs(file: GgufFile, info: TensorInfo) -> Iterator[tuple[int, Tensor]]:
    """All rows in order, (rows, row bytes) uint8 as stored, with the number of their matrix.

    A slab holds at most `SLAB_WEIGHTS` weights, or one row; of experts one is read at a time.
    """
    if len(info.shape) == 1:
        yield 0, file.read(info.name).unsqueeze(0)
        return
    step = max(1, SLAB_WEIGHTS // info.shape[-1])
    if len(info.shape) == 2:
        for begin in range(0, info.shape[0], step):
            yield 0, file.read(info.name, slice(begin, begin + step))
        return
    matrices = prod(info.shape[1:-2])  # of one leading index
    for index in range(info.shape[0]):
        rows = file.read(info.name, slice(index, index + 1)).flatten(0, -2)
        for within, matrix in enumerate(torch.split(rows, info.shape[-2])):
            for slab in torch.split(matrix, step):
                yield index * matrices + within, slab


def settled(file: GgufFile, info: TensorInfo, type: str) -> str:
    """`type`, or where it does not hold the tensor's weights the first of `WIDER` that does, or floats.

    Judged on rows evenly spread.

    Raises:
        ModelError: naming the tensor, for a weight that is not finite or too large for `type`.
    """
    if type == info.type:
        return type
    try:
        return _first_that_holds(info, type, _sample(file, info))
    except FormatError as exc:
        raise ModelError(f"{info.name}: {exc}") from exc


def _first_that_holds(info: TensorInfo, type: str, sample: Tensor) -> str:
    if not sample.isfinite().all():
        raise FormatError("weights that are not finite were found; quantize an intact file")
    floats = info.type if info.type in FLOAT_TYPES else "F32"
    if type in FLOAT_TYPES:
        return type if type != "F16" or _loss(type, sample) <= LOST_IN_HALF else floats
    if not underflows(BLOCK_TYPES[type], sample):
        return type
    unit = torch.ldexp(sample, -torch.frexp(sample.abs().amax()).exponent)
    allowed = TOLERATED_LOSS * _loss(type, unit)
    wider = [kind for kind in WIDER if info.shape[-1] % TYPES[kind].block_size == 0]
    return next((kind for kind in wider if _loss(kind, sample) <= allowed), floats)


def _loss(type: str, weight: Tensor) -> float:
    """Squared error of what `type` makes of weights, as a fraction of their squares."""
    if type == "F16":
        found = weight.half().float()
    else:
        found = TYPES[type].unpack(_rounded(type, weight, None, "fast"))
    exact = weight.double()
    return float((found.double() - exact).square().sum() / exact.square().sum().clamp_min(1e-300))


def _rounded(type: str, weight: Tensor, importance: Tensor | None, search: str) -> Tensor:
    if type in FLOAT_TYPES:
        return FLOAT_TYPES[type].pack(weight)
    kind = BLOCK_TYPES[type]
    return kind.pack(fit(kind, weight, importance, search=search))


def _sample(file: GgufFile, info: TensorInfo) -> Tensor:
    """(rows, in_features) float32, at most `SAMPLED_ROWS` or one of each matrix taken."""
    unpack = TYPES[info.type].unpack
    if len(info.shape) == 2:
        return unpack(file.read(info.name, _spread(info.shape[0], SAMPLED_ROWS)))
    indices = _spread(info.shape[0], SAMPLED_MATRICES)
    picked = []
    for index in indices.tolist():
        rows = file.read(info.name, slice(index, index + 1)).flatten(0, -2)
        picked.append(unpack(rows[_spread(len(rows), SAMPLED_ROWS // len(indices))]))
    return torch.cat(picked)


def _spread(count: int, most: int) -> Tensor:
    """At most `most` indices below `count`, evenly spread."""
    return torch.linspace(0, count - 1, min(count, max(1, most))).round().long()
