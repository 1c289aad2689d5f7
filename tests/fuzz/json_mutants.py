"""Mutants of JSON: most keep the syntax and break the sense."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

DEEP = "@deep@"  # stands for more levels than any parser takes
ODD: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    3,
    2**31,
    2**63,
    -(2**63),
    10**39,
    10**60,
    0.5,
    -0.5,
    1e308,
    1e-308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\ud800",
    "../../../etc/passwd",
    "line\nbreak\x1b[31m",
    "x" * 5000,
    [],
    {},
    [[]],
    [1, "a", None],
    {"a": {"b": [1]}},
    DEEP,
)


def mutated_text(text: str, rng: random.Random) -> bytes:
    """The text with one to three edits of its values or keys, now and then of its bytes."""
    if rng.random() < 0.15:
        return mutated_bytes(text.encode(), rng)
    tree = json.loads(text)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        tree = mutated(tree, rng)
    made = json.dumps(tree)
    if rng.random() < 0.03:  # a key given twice
        made = made.replace("{", '{"twice": 1, "twice": 2, ', 1)
    return made.replace(f'"{DEEP}"', "[" * 5000 + "]" * 5000).encode()


def mutated(tree: Any, rng: random.Random) -> Any:
    """A copy with one edit."""
    tree = copy.deepcopy(tree)
    places = _places(tree)
    if not places:
        return rng.choice(ODD)
    holder, key = _some_place(places, rng)
    edit = rng.choice(EDITS)
    edit(holder, key, rng)
    if rng.random() < 0.1:  # two values change places
        (a, i), (b, j) = rng.choice(places), rng.choice(places)
        if _holds(a, i) and _holds(b, j) and not isinstance(a[i], list | dict | type(b[j])):
            a[i], b[j] = b[j], copy.deepcopy(a[i])
    return tree


def mutated_bytes(data: bytes, rng: random.Random, most: int = 8) -> bytes:
    """Flipped bits, bytes set, cut, doubled or put in."""
    found = bytearray(data)
    for _ in range(rng.randint(1, most)):
        if not found:
            break
        at, kind = rng.randrange(len(found)), rng.randrange(6)
        if kind < 2:
            found[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            found[at] = rng.choice((0, 1, 127, 128, 255))
        elif kind == 3:
            found[at : at + 8] = rng.choice((b"\xff" * 8, bytes(8), b"\x00\x00\x00\x80" * 2))
        elif kind == 4 and rng.random() < 0.3:
            del found[at : at + rng.randint(1, 64)]
        elif rng.random() < 0.3:
            found[at:at] = found[at : at + rng.randint(1, 64)]
    return bytes(found)


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Every holder and key in a tree."""
    found, level = [], [tree]
    while level:
        value = level.pop()
        keys: Any = list(value) if isinstance(value, dict) else range(len(value)) if _is_list(value) else ()
        for key in keys:
            found.append((value, key))
            level.append(value[key])
    return found


def _some_place(places: list[tuple[Any, Any]], rng: random.Random) -> tuple[Any, Any]:
    """One place, those near the root as often as the many below."""
    return rng.choice(places[:20]) if rng.random() < 0.5 else rng.choice(places)


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _holds(holder: Any, key: Any) -> bool:
    return key in holder if isinstance(holder, dict) else key < len(holder)


def _replace(holder: Any, key: Any, rng: random.Random) -> None:
    holder[key] = copy.deepcopy(rng.choice(ODD))


def _remove(holder: Any, key: Any, _rng: random.Random) -> None:
    del holder[key]


def _nudge(holder: Any, key: Any, rng: random.Random) -> None:
    """A value of the same type, a little or far off."""
    value = holder[key]
    if isinstance(value, bool):
        holder[key] = not value
    elif isinstance(value, int):
        holder[key] = rng.choice((value + 1, value - 1, -value, 2 * value, 1000 * value, 0, 2**62))
    elif isinstance(value, float):
        holder[key] = rng.choice((-value, value * 1e9, value + 1e-9, 1e300))
    elif isinstance(value, str):
        holder[key] = rng.choice((value + "x", value[:-1], value * 2, value.upper(), " "))
    elif isinstance(value, list):
        holder[key] = rng.choice((value[1:], value + value[:1], value[::-1], value * 2))
    else:
        _replace(holder, key, rng)


def _wrap(holder: Any, key: Any, rng: random.Random) -> None:
    holder[key] = rng.choice(([holder[key]], {"a": holder[key]}, str(holder[key])[:1000]))


def _rename(holder: Any, key: Any, rng: random.Random) -> None:
    if isinstance(holder, dict):
        holder[rng.choice((f"{key}x", key[:-1], "", "\ud800", f"{key}.weight"))] = holder.pop(key)
    else:
        _replace(holder, key, rng)


def _copy_from(holder: Any, key: Any, rng: random.Random) -> None:
    """The value of a neighbour."""
    keys = list(holder) if isinstance(holder, dict) else range(len(holder))
    holder[key] = copy.deepcopy(holder[rng.choice(list(keys))])


EDITS: tuple[Callable[[Any, Any, random.Random], None], ...] = (
    _replace,
    _replace,
    _remove,
    _nudge,
    _nudge,
    _wrap,
    _rename,
    _copy_from,
)
