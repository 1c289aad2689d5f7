"""Parquet files of odd schemas and odd cells, some with their bytes broken."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.fuzz.json_mutants import mutated_bytes, mutated_text

WORDS = "the quick brown fox jumps over 12 lazy dogs , für Elise 🙂 <|end_of_text|>".split()
CHAT = [{"role": "user", "content": "hello there"}, {"role": "assistant", "content": "good day to you"}]
MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
PACKINGS = ("none", "snappy", "gzip", "zstd", "brotli", "lz4")


def parquet(path: Path, rng: random.Random) -> None:
    """Writes a file that is well-formed but odd, in four of ten then broken."""
    table = pa.table(_columns(rng))
    pq.write_table(
        table,
        path,
        compression=rng.choice(PACKINGS),
        use_dictionary=rng.random() < 0.5,
        row_group_size=rng.choice((1, 7, 1000)),
        data_page_size=rng.choice((16, 1 << 20)),
        data_page_version=rng.choice(("1.0", "2.0")),
        write_page_index=rng.random() < 0.2,
    )
    if rng.random() < 0.4:
        path.write_bytes(_broken(path.read_bytes(), rng))


def _broken(content: bytes, rng: random.Random) -> bytes:
    length = int.from_bytes(content[-8:-4], "little")
    footer, kind = len(content) - 8 - length, rng.random()
    if kind < 0.35:  # the footer alone, its length left right
        made = mutated_bytes(content[footer:-8], rng, 3)
        return content[:footer] + made + len(made).to_bytes(4, "little") + content[-4:]
    if kind < 0.9:  # pages and their headers
        return content[:4] + mutated_bytes(content[4:footer], rng, 3) + content[footer:]
    if kind < 0.95:
        return content[: rng.randrange(len(content))]
    return content[:-8] + rng.choice((b"\xff\xff\xff\x7f", bytes(4), b"\x10\x00\x00\x00")) + content[-4:]


def _columns(rng: random.Random) -> dict[str, pa.Array]:
    name = rng.choice(("text", "text", "messages", "messages", "input_ids", "input_ids", "body"))
    n_rows = rng.choice((0, 1, 3, 40))
    array = rng.choice(MAKERS[name])(rng, n_rows)
    columns = {name: array}
    if rng.random() < 0.3:
        columns["other"] = pa.array([rng.choice((None, {"a": [1]})) for _ in range(len(array))])
    return columns


def _words(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.choice((0, 3, 60, 400)))) + rng.choice(
        ("", "\n", "\r\n", "\x00")
    )


def _strings(rng: random.Random, n_rows: int) -> pa.Array:
    cells = [rng.choice((None, _words(rng), _words(rng), _words(rng))) for _ in range(n_rows)]
    kind = rng.choice((pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())))
    return pa.array(cells, pa.string()).cast(kind)


def _not_utf8(rng: random.Random, n_rows: int) -> pa.Array:
    """Lone surrogates in the way that Java writes them, and other bytes."""
    cells = [rng.choice((b"good words", b"\xed\xa0\x80 half", b"\xff\xfe")) for _ in range(n_rows)]
    offsets = [0]
    for cell in cells:
        offsets.append(offsets[-1] + len(cell))
    places = pa.array(offsets, pa.int32()).buffers()[1]
    return pa.StringArray.from_buffers(n_rows, places, pa.py_buffer(b"".join(cells)))


def _chats(rng: random.Random, n_rows: int) -> pa.Array:
    cells = [rng.choice((None, [], CHAT, CHAT, [*CHAT, None], [{"role": None}])) for _ in range(n_rows)]
    return pa.array(cells, pa.list_(MESSAGE))


def _json_chats(rng: random.Random, n_rows: int) -> pa.Array:
    """JSON of chats, some of them mutants."""
    whole = json.dumps(CHAT)
    cells = [
        mutated_text(whole, rng).decode(errors="replace") if rng.random() < 0.1 else whole
        for _ in range(n_rows)
    ]
    return pa.array(cells)


def _ids(rng: random.Random, n_rows: int) -> pa.Array:
    most = rng.choice((250, 250, 250, 260, 2**31 - 1))
    kind = rng.choice((pa.int64(), pa.int32(), pa.uint16(), pa.uint64()))
    top = min(most, 2**16 - 1) if kind == pa.uint16() else most
    cells: list[Any] = [[rng.randrange(4, top) for _ in range(rng.choice((0, 5, 90)))] for _ in range(n_rows)]
    if rng.random() < 0.2 and cells:
        cells[rng.randrange(len(cells))] = rng.choice((None, [None]))
    return pa.array(cells, rng.choice((pa.list_, pa.large_list))(kind))


def _others(rng: random.Random, n_rows: int) -> pa.Array:
    """Of a type that no reader wants."""
    value, kind = rng.choice(
        (
            (1.5, pa.float32()),
            (1, pa.timestamp("ns")),
            ([1.5], pa.list_(pa.float64())),
            ([["a"]], pa.list_(pa.list_(pa.string()))),
            ([("a", 1)], pa.map_(pa.string(), pa.int32())),
            (None, pa.null()),
            (b"ab", pa.binary(2)),
            (True, pa.bool_()),
            ({"role": "a"}, pa.struct([("role", pa.string())])),
        )
    )
    return pa.array([value] * n_rows, kind)


MAKERS: dict[str, tuple[Any, ...]] = {
    "text": (_strings, _strings, _not_utf8, _others),
    "messages": (_chats, _json_chats, _json_chats, _strings, _others),
    "input_ids": (_ids, _ids, _ids, _others),
    "body": (_strings,),
}
