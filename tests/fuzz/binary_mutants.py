"""Mutants of safetensors, GGUF and legacy importance files, taken apart and put together again with lies."""

from __future__ import annotations

import json
import random
import struct
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tests.fuzz.json_mutants import mutated, mutated_bytes

DTYPES = ("F16", "BF16", "F32", "F64", "I64", "U8", "BOOL", "F8_E4M3", "F4", "C64", "X")
ABSURD = (0, 1, 7, 31, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1)
KINDS = range(14)  # of GGUF values, one more than there are
WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, ARRAY = 8, 9


def safetensors(data: bytes, rng: random.Random) -> bytes:
    """The header's values edited, its length a lie, or bytes broken."""
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = data[8 : 8 + length], data[8 + length :]
    choice = rng.random()
    if choice < 0.1:
        return mutated_bytes(data[: 8 + length], rng) + rest
    if choice < 0.15:
        return struct.pack("<Q", rng.choice(ABSURD)) + header + rest
    if choice < 0.2:
        return data[: rng.randrange(len(data))]
    tree = json.loads(header)
    names = [name for name in tree if name != "__metadata__"]
    for _ in range(rng.choice((1, 1, 2))):
        entry = tree.get(rng.choice(names))
        kind = rng.randrange(8)
        if kind < 4 or not isinstance(entry, dict):
            tree = mutated(tree, rng)
        elif kind == 4:
            entry["dtype"] = rng.choice(DTYPES)
        elif kind == 5 and isinstance(entry.get("shape"), list):
            entry["shape"] = rng.choice((entry["shape"][::-1], [*entry["shape"], 1], [], [0, 2**40]))
        elif kind == 6:
            a, b = rng.choice(names), rng.choice(names)
            tree[a], tree[b] = tree.get(b), tree.get(a)
        else:
            name = rng.choice(names)
            tree[rng.choice((f"{name}x", name.replace("0", "1")))] = tree.pop(name, None)
        if not isinstance(tree, dict):
            break
    made = json.dumps(tree).encode()
    made += b" " * (-len(made) % 8)
    return struct.pack("<Q", len(made)) + made + rest


@dataclass(frozen=True)
class Value:
    """A metadata entry as stored; `count` may lie."""

    key: bytes
    kind: int
    element: int
    count: int
    body: bytes


@dataclass(frozen=True)
class Info:
    name: bytes
    dims: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True)
class Parts:
    """A GGUF file taken apart; `counts` are those announced."""

    version: int
    counts: tuple[int, int]
    values: tuple[Value, ...]
    infos: tuple[Info, ...]
    data: bytes


def take_apart(content: bytes) -> Parts:
    version, n_tensors, n_values = struct.unpack_from("<IQQ", content, 4)
    at = 24

    def number(form: str) -> int:
        nonlocal at
        (found,) = struct.unpack_from(form, content, at)
        at += struct.calcsize(form)
        return int(found)

    def take(length: int) -> bytes:
        nonlocal at
        at += length
        return content[at - length : at]

    values, infos = [], []
    for _ in range(n_values):
        key, kind = take(number("<Q")), number("<I")
        element, count = (number("<I"), number("<Q")) if kind == ARRAY else (kind, 1)
        begin = at
        for _ in range(count):
            take(number("<Q") if element == STRING else WIDTHS[element])
        values.append(Value(key, kind, element, count, content[begin:at]))
    for _ in range(n_tensors):
        name = take(number("<Q"))
        dims = tuple(number("<Q") for _ in range(number("<I")))
        infos.append(Info(name, dims, number("<I"), number("<Q")))
    return Parts(version, (n_tensors, n_values), tuple(values), tuple(infos), content[-(-at // 32) * 32 :])


def put_together(parts: Parts) -> bytes:
    made = b"GGUF" + struct.pack("<IQQ", parts.version, *parts.counts)
    for value in parts.values:
        made += struct.pack("<Q", len(value.key)) + value.key + struct.pack("<I", value.kind)
        if value.kind == ARRAY:
            made += struct.pack("<IQ", value.element, value.count)
        made += value.body
    for info in parts.infos:
        made += struct.pack("<Q", len(info.name)) + info.name
        made += struct.pack(f"<I{len(info.dims)}Q", len(info.dims), *info.dims)
        made += struct.pack("<IQ", info.kind, info.offset)
    return made + bytes(-len(made) % 32) + parts.data


def gguf(content: bytes, rng: random.Random) -> bytes:
    """Types, counts, lengths, names, shapes and offsets edited, or bytes broken."""
    parts = take_apart(content)
    if rng.random() < 0.12:
        return mutated_bytes(content[: len(content) - len(parts.data)], rng) + parts.data
    if rng.random() < 0.04:
        return content[: rng.randrange(len(content))]
    for _ in range(rng.choice((1, 1, 2, 3))):
        parts = _edited(parts, rng)
    return put_together(parts)


def _edited(parts: Parts, rng: random.Random) -> Parts:
    if rng.random() < 0.05:
        counts = (rng.choice((parts.counts[0], *ABSURD)), rng.choice((parts.counts[1], *ABSURD)))
        return replace(parts, counts=counts, version=rng.choice((3, 3, 2, 1, 0x03000000)))
    if rng.random() < 0.6:
        values = list(parts.values)
        at = rng.randrange(len(values))
        values[at] = _edited_value(values[at], rng, values)
        return replace(parts, values=tuple(values))
    infos = list(parts.infos)
    at = rng.randrange(len(infos))
    infos[at] = _edited_info(infos[at], rng, infos)
    data = parts.data if rng.random() < 0.7 else mutated_bytes(parts.data[:4096], rng) + parts.data[4096:]
    return replace(parts, infos=tuple(infos), data=data)


def _edited_value(value: Value, rng: random.Random, others: list[Value]) -> Value:
    kind = rng.randrange(7)
    if kind == 0:  # another value altogether, whole
        text = rng.choice((b"", b"x", b"\xff\xfe", b"llama", b"a" * 3000))
        return Value(value.key, STRING, STRING, 1, struct.pack("<Q", len(text)) + text)
    if kind == 1:
        return Value(value.key, 4, 4, 1, struct.pack("<I", rng.choice(ABSURD) & 0xFFFFFFFF))
    if kind == 2:
        return Value(value.key, 6, 6, 1, struct.pack("<f", rng.choice((float("nan"), float("inf"), -1.0))))
    if kind == 3:
        count = rng.choice((0, 1, 5))
        return Value(value.key, ARRAY, 5, count, struct.pack(f"<{count}i", *range(-1, count - 1)))
    if kind == 4:
        keys = [b"", b"\xff", rng.choice(others).key, b"split.count", b"general.alignment", b"general.name"]
        return replace(value, key=rng.choice(keys))
    if kind == 5:
        return replace(value, count=rng.choice(ABSURD), kind=rng.choice(KINDS))
    return replace(value, body=mutated_bytes(value.body, rng, 2), element=rng.choice((value.element, *KINDS)))


def _edited_info(info: Info, rng: random.Random, others: list[Info]) -> Info:
    kind = rng.randrange(6)
    if kind == 0:
        return replace(info, kind=rng.randrange(45))
    if kind == 1:
        return replace(info, offset=rng.choice((*ABSURD, info.offset + 32, rng.choice(others).offset)))
    if kind == 2:
        return replace(info, dims=rng.choice((info.dims[::-1], (*info.dims, 1), info.dims[:1], (), (1,) * 9)))
    if kind == 3:
        return replace(info, dims=tuple(rng.choice((n, n, n + 32, n // 2, *ABSURD)) for n in info.dims))
    if kind == 4:
        return replace(
            info, name=rng.choice((b"", b"\xff", rng.choice(others).name, info.name + b"x", b"a" * 99))
        )
    return replace(info, kind=rng.choice((0, 1, 8, 12, 30)), dims=tuple(max(1, n // 2) for n in info.dims))


def dat(content: bytes, rng: random.Random) -> bytes:
    """A legacy importance file: counts and lengths, names, values that are none."""
    if rng.random() < 0.15:
        return mutated_bytes(content[:200], rng) + content[200:]
    if rng.random() < 0.05:
        return content[: rng.randrange(len(content))]
    (n_entries,) = struct.unpack_from("<i", content)
    at, made = 4, []
    for _ in range(n_entries):
        (length,) = struct.unpack_from("<i", content, at)
        name = content[at + 4 : at + 4 + length]
        calls, count = struct.unpack_from("<ii", content, at + 4 + length)
        begin = at + 12 + length
        at = begin + 4 * count
        made.append([name, calls, count, content[begin:at]])
    entry: Any = rng.choice(made)
    kind = rng.randrange(7)
    if kind == 0:
        entry[0] = rng.choice((b"", b"\xff\xfe", rng.choice(made)[0], b"blk.0.x.weight", b"a" * 70))
    elif kind == 1:
        entry[1] = rng.choice((0, -1, 2**31 - 1, -(2**31), 5))
    elif kind == 2:
        entry[2] = rng.choice((0, -1, 2**31 - 1, entry[2] - 1, entry[2] + 1))
    elif kind == 3:
        values = np.frombuffer(entry[3], "<f4").copy()
        values[rng.randrange(len(values))] = rng.choice((np.nan, np.inf, -1.0, 3e38, 0.0))
        entry[3] = values.tobytes()
    elif kind == 4:
        entry[2], entry[3] = entry[2] // 2, entry[3][: 4 * (entry[2] // 2)]
    elif kind == 5:
        n_entries = rng.choice((0, -1, 2**31 - 1, n_entries - 1, n_entries + 1))
    else:
        made.remove(entry)
        n_entries = len(made)
    parts = [struct.pack("<i", n_entries)]
    for name, calls, count, body in made:
        parts.append(struct.pack("<i", len(name)) + name + struct.pack("<ii", calls, count) + body)
    return b"".join(parts) + content[at:]
