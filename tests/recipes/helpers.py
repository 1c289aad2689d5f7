"""Small made-up measurements, and the slow way to the best allocation."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any

from exlq.formats.exl2_options import HEAD_OPTIONS, OPTIONS
from exlq.measurement import LinearRecord, Measurement, OptionRecord
from exlq.models.layout import EMBEDDING_KEY, HEAD_KEY
from exlq.recipes.room import Room
from exlq.recipes.sheet import Options
from exlq.types import Option

BITS = {"Q2_K": 2.625, "Q4_K": 4.5, "Q6_K": 6.5625, "Q8_0": 8.5}
EXL2 = tuple(option for option in OPTIONS if option.desc in ("1:3b 32g s4", "1:4b 32g s4", "1:4b 64g s4"))
PARTS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
OVERHEAD = {"exl2": 500, "gguf": 1000}


def record(
    n_blocks: int = 2,
    parts: Sequence[str] = PARTS,
    seed: int = 0,
    tied: bool = False,
    ties: Sequence[str] = (),
    **changes: Any,
) -> Measurement:
    """Both formats' options for every matrix; linears named in `ties` share their block's tensor."""
    lot = random.Random(seed)
    linears = [
        LinearRecord(
            f"model.layers.{block}.{part}",
            size := lot.choice([4096, 8192, 12288]),
            (*_exl2(size, lot), *_gguf(size, lot)),
            tie=f"model.layers.{block}.fused" if part in ties else None,
        )
        for block in range(n_blocks)
        for part in parts
    ]
    heads = tuple(
        _option(o.desc, dict(o.qparams), 16384, 2 + i, lot) for i, o in enumerate(HEAD_OPTIONS.values())
    )
    linears.append(LinearRecord(HEAD_KEY, 16384, heads if tied else (*heads, *_gguf(16384, lot))))
    linears.append(LinearRecord(EMBEDDING_KEY, 16384, _gguf(16384, lot)))
    values: dict[str, Any] = {
        "settings": {"rounding": "gptq"},
        "extra": {"overhead_bytes": OVERHEAD},
        **changes,
    }
    return Measurement({"architecture": "made up"}, {}, linears=tuple(linears), **values)


def large(seed: int) -> Measurement:
    """A Llama of 7 billion weights: 224 linears with all options of both formats, head and embedding."""
    lot = random.Random(seed)
    wide, narrow = 4096 * 11008, 4096 * 4096
    sizes = {"q": narrow, "k": narrow, "v": narrow, "o": narrow, "gate": wide, "up": wide, "down": wide}

    def options(size: int, made: Sequence[Option]) -> tuple[OptionRecord, ...]:
        exl2 = [(o, sum(b * p for b, p in zip(*_widths(o), strict=True))) for o in made]
        return tuple(
            _option(o.desc, dict(o.qparams), size, bits + 6 / o.qparams["group_size"], lot)
            for o, bits in exl2
        )

    linears = [
        LinearRecord(f"model.layers.{i}.{name}_proj", size, (*options(size, OPTIONS), *_gguf(size, lot)))
        for i in range(32)
        for name, size in sizes.items()
    ]
    end, heads = 32000 * 4096, tuple(HEAD_OPTIONS.values())
    linears.append(LinearRecord(HEAD_KEY, end, (*options(end, heads), *_gguf(end, lot))))
    linears.append(LinearRecord(EMBEDDING_KEY, end, _gguf(end, lot)))
    return Measurement({}, {}, {}, tuple(linears), {"overhead_bytes": OVERHEAD})


def _widths(option: Option) -> tuple[Sequence[float], Sequence[float]]:
    return option.qparams["bits"], option.qparams["bits_prop"]


def every_choice(room: Room) -> Iterator[Options]:
    """All there are, tied linears alike."""
    groups: dict[str, list[LinearRecord]] = {}
    for linear in room.free:
        groups.setdefault(linear.tie or linear.key, []).append(linear)
    for indices in itertools.product(*(range(len(members[0].options)) for members in groups.values())):
        yield room.whole(
            {
                linear.key: linear.options[index]
                for members, index in zip(groups.values(), indices, strict=True)
                for linear in members
            }
        )


def _exl2(size: int, lot: random.Random) -> tuple[OptionRecord, ...]:
    return tuple(
        _option(o.desc, dict(o.qparams), size, o.qparams["bits"][0] + 8 / o.qparams["group_size"], lot)
        for o in EXL2
    )


def _gguf(size: int, lot: random.Random) -> tuple[OptionRecord, ...]:
    return tuple(_option(name, {"type": name}, size, bits, lot) for name, bits in BITS.items())


def _option(desc: str, qparams: Any, size: int, bits: float, lot: random.Random) -> OptionRecord:
    total = 8 * round(size * bits / 8)
    err = 0.3 * 4.0**-bits * lot.uniform(0.5, 2.0)
    return OptionRecord(desc, total / size, total, err, qparams, err, err * lot.uniform(0.01, 1.0))
