"""All that `exlq plan` says of a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from exlq.errors import InputError, ModelError, TargetError
from exlq.sizes import format_bytes
from exlq.sizing import work
from exlq.sizing.effort import EFFORTS, ROW_LENGTH, rows_of
from exlq.sizing.fitting import (
    Fit,
    Room,
    bits_fit,
    common_fits,
    contexts,
    largest_bits,
    largest_file,
    largest_recipe,
    least_memory,
    too_little,
)
from exlq.sizing.running import CACHES, LLAMA_BATCH, MARGIN_BYTES, require_context
from exlq.sizing.shapes import ModelShape
from exlq.sizing.stored import FLOAT16_BYTES, STORED, formats_of

HELDOUT_EVERY = 8  # of `calibration.rows`


@dataclass(frozen=True)
class Cost:
    """What a conversion to all formats takes with one effort: seconds by stage, bytes."""

    effort: str
    quantize_tokens: int
    measure_tokens: int
    stages_s: dict[str, float]
    memory_bytes: int
    disk_bytes: int

    @property
    def total_s(self) -> float:
        return sum(self.stages_s.values())

    @property
    def measuring_s(self) -> float:
        return work.measuring_seconds(self.stages_s)


@dataclass(frozen=True)
class Advice:
    """What fits and what it costs.

    `bits` has the most bits per weight by format; `table` gives the common sizes at each of `contexts`.
    """

    shape: ModelShape
    room: Room
    formats: tuple[str, ...]
    bits: dict[str, tuple[float, Fit]]
    recipe: Fit | None
    file_bytes: int | None
    contexts: tuple[int, ...]
    table: tuple[tuple[Fit, ...], ...]  # (sizes, contexts)
    costs: tuple[Cost, ...]
    notes: tuple[str, ...]


def advise(shape: ModelShape, room: Room, rate: float, head_bits: int = 6) -> Advice:
    """What fits in the room, and what the conversion takes at `rate` operations per second.

    Raises:
        TargetError: if nothing fits; it says how much memory is wanted at least.
        ConfigError: for a context the model does not have.
        ModelError: if the model can be written in no format.
    """
    formats, left_out = writable(shape)
    require_context(shape, room.context)
    if (wanted := least_memory(shape, formats, room)) > room.memory:
        raise TargetError(too_little(room, wanted))
    bits = {}
    for name in formats:
        with suppress(TargetError):
            found = largest_bits(shape, [name], room, head_bits)
            bits[name] = (found, bits_fit(shape, name, found, room, head_bits))
    recipe = largest_recipe(shape, room) if "gguf" in formats else None
    file_bytes = largest_file(shape, room) if "gguf" in formats else None
    shown = contexts(shape, room.context)
    columns = [common_fits(shape, formats, replace(room, context=context), head_bits) for context in shown]
    return Advice(
        shape,
        room,
        formats,
        bits,
        recipe,
        file_bytes,
        shown,
        tuple(zip(*columns, strict=True)),
        tuple(cost(shape, formats, name, rate, bits) for name in EFFORTS),
        (*left_out, *_notes(shape, formats, room)),
    )


def cost(
    shape: ModelShape, formats: Sequence[str], effort: str, rate: float, bits: dict[str, tuple[float, Fit]]
) -> Cost:
    """What a conversion takes that measures the options of all formats and makes the largest that fit."""
    length = min(ROW_LENGTH, shape.max_length)
    wanted = EFFORTS[effort]
    rows = rows_of(wanted.quantize_tokens, length)
    measured = rows_of(wanted.measure_tokens, length)
    tokens = work.Tokens(rows * length, math.ceil(rows / HELDOUT_EVERY) * length, measured * length)
    tries = [sum(STORED[name].tried(spec) for name in formats) for spec in shape.linears]
    sizes = [fit.running.weights for _, fit in bits.values()]
    return Cost(
        effort,
        tokens.quantize,
        tokens.measure,
        work.stage_seconds(shape.linears, tries, tokens, work.Todo(tuple(formats)), rate, shape.share),
        work.memory_bytes(shape.linears, shape.hidden_size),
        work.disk_bytes(shape.linears, shape.hidden_size, shape.n_blocks, tokens, sizes, shape.share),
    )


def writable(shape: ModelShape) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The formats the model can be written as, and why not the others."""
    found, reasons = (
        [],
        [
            f"no {name}: its program does not know {shape.architecture}"
            for name in STORED
            if name not in formats_of(shape)
        ],
    )
    for name in formats_of(shape):
        try:
            STORED[name].reach(shape)
            found.append(name)
        except InputError as exc:
            reasons.append(f"no {name}: {exc}")
    if not found:
        raise ModelError("; ".join(reasons))
    return tuple(found), tuple(reasons)


def _notes(shape: ModelShape, formats: Sequence[str], room: Room) -> list[str]:
    names = [f"{CACHES[room.cache][name].name} in {RUNTIMES[name]}" for name in formats]
    notes = [f"KV cache: {', '.join(names)}; {MARGIN_BYTES >> 20} MiB are kept free for the program itself"]
    if "exl2" in formats:
        embedding = format_bytes(FLOAT16_BYTES * shape.embedding.numel)
        notes.append(f"{embedding} of EXL2 are the embedding, which ExLlamaV2 keeps in the CPU's memory")
    if shape.n_windowed and "gguf" in formats:
        notes.append(
            f"llama.cpp's programs keep {shape.window + LLAMA_BATCH:,} tokens in {shape.n_windowed} of the "
            f"{shape.n_blocks} blocks, which have a sliding window; --swa-full keeps all"
        )
    if shape.n_windowed and "exl2" in formats:
        notes.append("ExLlamaV2 keeps the whole context in all blocks, those with a sliding window too")
    return notes


RUNTIMES = {"exl2": "ExLlamaV2", "gguf": "llama.cpp"}
