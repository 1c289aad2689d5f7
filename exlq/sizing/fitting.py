"""The largest model that fits into memory, beside its KV cache and buffers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from exlq.errors import TargetError
from exlq.names import HEAD_BITS
from exlq.sizes import format_bytes
from exlq.sizing.running import Running, require_context, running
from exlq.sizing.shapes import ModelShape
from exlq.sizing.stored import STORED, extreme_bytes, recipe_bytes

BITS = (2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 6.0, 8.0)
RECIPES = ("Q2_K", "Q3_K_M", "IQ4_XS", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K", "Q8_0", "F16")
CONTEXTS = tuple(2048 << shift for shift in range(0, 12, 2))  # 2k, 8k, 32k, …
DEFAULT_CONTEXT = 8192  # or the model's maximum if that is less


@dataclass(frozen=True)
class Room:
    """What there is: bytes of memory for weights, KV cache of `context` tokens, buffers and margin."""

    memory: int
    context: int
    cache: str = "f16"


@dataclass(frozen=True)
class Fit:
    """One way to store the model: `choice` is bits per weight or a recipe, as a person gives it."""

    format: str
    choice: str
    running: Running


def default_context(shape: ModelShape) -> int:
    return min(DEFAULT_CONTEXT, shape.max_length)


def contexts(shape: ModelShape, asked: int) -> tuple[int, ...]:
    """Contexts to show: the usual ones the model has, its maximum and the one asked for."""
    usual = {context for context in CONTEXTS if context <= shape.max_length}
    return tuple(sorted(usual | {asked, shape.max_length}))


def largest_bits(shape: ModelShape, formats: Sequence[str], room: Room, head_bits: int = 6) -> float:
    """The most bits per weight, in whole hundredths, at which all `formats` fit.

    Never more than every format can have.

    Raises:
        ConfigError: for a context the model does not have.
        ModelError: for a format the model cannot be written as.
        TargetError: if the fewest bits do not fit; it says how much memory they want.
    """
    require_context(shape, room.context)
    reaches = [STORED[name].reach(shape) for name in formats]
    least = math.ceil(100 * max(low for low, _ in reaches) - 1e-9)
    most = math.floor(100 * min(high for _, high in reaches) + 1e-9)
    wanted = partial(_wanted, shape, formats, room, head_bits)
    if least > most:
        raise TargetError(f"no number of bits per weight suits {' and '.join(formats)}; give one --format")
    if wanted(least) > room.memory:
        raise TargetError(too_little(room, wanted(least)))
    while least < most:  # the largest that fits is between these
        middle = (least + most + 1) // 2
        least, most = (middle, most) if wanted(middle) <= room.memory else (least, middle - 1)
    return least / 100


def largest_recipe(shape: ModelShape, room: Room) -> Fit | None:
    """The largest GGUF recipe that fits, None if none does."""
    fits = [fit for fit in recipe_fits(shape, room) if fit.running.total <= room.memory]
    return max(fits, key=lambda fit: fit.running.weights, default=None)


def largest_file(shape: ModelShape, room: Room) -> int | None:
    """The most bytes a GGUF file of mixed types may have, None if the smallest does not fit."""
    least, most = extreme_bytes(shape)
    free = room.memory - running(shape, "gguf", 0, room.context, room.cache).total
    return min(free, most) if free >= least else None


def bits_fit(shape: ModelShape, format: str, bits: float, room: Room, head_bits: int = 6) -> Fit:
    weights = STORED[format].n_bytes(shape, bits, head_bits)
    return Fit(format, f"{bits:g} bpw", running(shape, format, weights, room.context, room.cache))


def recipe_fits(shape: ModelShape, room: Room) -> tuple[Fit, ...]:
    """The common recipes, smallest first."""
    sizes = sorted((recipe_bytes(shape, name), name) for name in RECIPES)
    return tuple(Fit("gguf", name, running(shape, "gguf", n, room.context, room.cache)) for n, name in sizes)


def common_fits(shape: ModelShape, formats: Sequence[str], room: Room, head_bits: int = 6) -> tuple[Fit, ...]:
    """The common sizes of the formats: EXL2 by bits per weight, GGUF by recipe."""
    found: tuple[Fit, ...] = ()
    if "exl2" in formats:
        low, high = STORED["exl2"].reach(shape)
        found = tuple(bits_fit(shape, "exl2", bits, room, head_bits) for bits in BITS if low <= bits <= high)
    return found + (recipe_fits(shape, room) if "gguf" in formats else ())


def _wanted(shape: ModelShape, formats: Sequence[str], room: Room, head_bits: int, hundredths: int) -> int:
    """Memory that the largest of the formats takes."""
    return max(bits_fit(shape, name, hundredths / 100, room, head_bits).running.total for name in formats)


def least_memory(shape: ModelShape, formats: Sequence[str], room: Room) -> int:
    """What the smallest that can be made takes, of any of the formats."""
    sizes = {"gguf": extreme_bytes(shape)[0]} if "gguf" in formats else {}
    if "exl2" in formats:
        sizes["exl2"] = STORED["exl2"].n_bytes(shape, STORED["exl2"].reach(shape)[0], min(HEAD_BITS))
    runs = (running(shape, name, size, room.context, room.cache) for name, size in sizes.items())
    return min(run.total for run in runs)


def too_little(room: Room, wanted: int) -> str:
    return (
        f"--memory {format_bytes(room.memory)}: at {room.context:,} tokens of context the smallest wants "
        f"{format_bytes(wanted)}; give that or a shorter --context"
    )
