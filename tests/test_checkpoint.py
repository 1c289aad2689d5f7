"""Weights of every kind are read lazily and alike; what is broken is refused by name."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from exlq.checkpoint.hashes import file_hashes, tokenizer_hash
from exlq.checkpoint.open import open_checkpoint
from exlq.errors import ModelError

TENSORS: dict[str, Tensor] = {
    "a.weight": torch.arange(40.0).reshape(10, 4),
    "b.weight": torch.arange(6.0).reshape(3, 2).bfloat16(),
    "c.bias": torch.arange(5.0).half(),
}


def _one_safetensors(directory: Path) -> None:
    save_file(TENSORS, directory / "model.safetensors")


def _other_safetensors(directory: Path) -> None:
    save_file(TENSORS, directory / "weights.safetensors")


def _sharded(directory: Path, suffix: str = ".safetensors", stem: str = "model") -> dict[str, str]:
    """Two shards and their index; the mapping it holds."""
    names = list(TENSORS)
    parts = {f"{stem}-1{suffix}": names[:1], f"{stem}-2{suffix}": names[1:]}
    for file, keys in parts.items():
        held = {key: TENSORS[key] for key in keys}
        save_file(held, directory / file) if suffix == ".safetensors" else torch.save(held, directory / file)
    promised = {key: file for file, keys in parts.items() for key in keys}
    _write_index(directory, promised, f"{stem}{suffix}.index.json")
    return promised


def _write_index(
    directory: Path, promised: dict[str, Any], name: str = "model.safetensors.index.json"
) -> None:
    (directory / name).write_text(json.dumps({"metadata": {}, "weight_map": promised}), encoding="utf-8")


def _sharded_bin(directory: Path) -> None:
    _sharded(directory, ".bin", "pytorch_model")


def _state_dict(name: str) -> Callable[[Path], None]:
    return lambda directory: torch.save(TENSORS, directory / name)


def _with_training_state(directory: Path) -> None:
    _one_safetensors(directory)
    torch.save({"step": 3}, directory / "optimizer.pt")
    save_file({"a.weight": torch.zeros(1)}, directory / "consolidated.safetensors")


MAKERS: dict[str, Callable[[Path], Any]] = {
    "one safetensors": _one_safetensors,
    "safetensors of another name": _other_safetensors,
    "sharded safetensors": _sharded,
    "sharded bin": _sharded_bin,
    "bin": _state_dict("pytorch_model.bin"),
    "pt": _state_dict("model.pt"),
    "pth": _state_dict("consolidated.00.pth"),
    "beside what is no weights": _with_training_state,
}


@pytest.mark.parametrize("maker", MAKERS)
def test_every_kind_of_file_gives_the_tensors_that_were_saved(tmp_path: Path, maker: str) -> None:
    MAKERS[maker](tmp_path)
    weights = open_checkpoint(tmp_path)
    assert set(weights.keys()) == set(TENSORS)
    for key, wanted in TENSORS.items():
        assert weights.shape(key) == tuple(wanted.shape)
        assert weights.dtype(key) == wanted.dtype
        assert torch.equal(weights.read(key), wanted)
        assert torch.equal(weights.read(key, slice(1, 3)), wanted[1:3])
        assert torch.equal(weights.read(key, torch.tensor([2, 0, 2])), wanted[[2, 0, 2]])


def test_rows_of_a_large_tensor_are_read_without_the_rest(tmp_path: Path) -> None:
    """A sparse file of 3 GB; the process's peak memory, where the system can tell, stays far below."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not status.exists() or not reset.exists():
        pytest.skip("no per-process peak memory to reset here")
    rows, columns = 3 << 17, 2048
    header = json.dumps(
        {"w": {"dtype": "F32", "shape": [rows, columns], "data_offsets": [0, rows * columns * 4]}}
    )
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header.encode())
        file.truncate(8 + len(header) + rows * columns * 4)
    reset.write_text("5", encoding="ascii")
    before = _peak_bytes(status)
    weights = open_checkpoint(tmp_path)
    assert weights.read("w", torch.tensor([0, rows - 1])).shape == (2, columns)
    assert weights.read("w", slice(rows // 2, rows // 2 + 4)).sum() == 0
    assert _peak_bytes(status) - before < 100e6


def _peak_bytes(status: Path) -> int:
    (line,) = (line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def test_an_index_may_not_lead_outside_its_directory(tmp_path: Path) -> None:
    inside = tmp_path / "model"
    inside.mkdir()
    save_file(TENSORS, tmp_path / "outside.safetensors")
    for name in (
        "../outside.safetensors",
        str(tmp_path / "outside.safetensors"),
        r"..\outside.safetensors",
        "C:x.bin",
    ):
        _write_index(inside, dict.fromkeys(TENSORS, name))
        with pytest.raises(ModelError, match="which is outside"):
            open_checkpoint(inside)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    _sharded(tmp_path)
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(ModelError, match=r"names the shard model-2\.safetensors, which is not there"):
        open_checkpoint(tmp_path)


def test_a_tensor_promised_but_absent_is_named(tmp_path: Path) -> None:
    promised = _sharded(tmp_path)
    _write_index(tmp_path, {**promised, "d.weight": "model-1.safetensors"})
    with pytest.raises(
        ModelError, match=r"model-1\.safetensors lacks d\.weight, which model\.safetensors\.index"
    ):
        open_checkpoint(tmp_path)


def test_a_tensor_held_twice_is_named(tmp_path: Path) -> None:
    _other_safetensors(tmp_path)
    save_file({"b.weight": torch.zeros(2)}, tmp_path / "more.safetensors")
    with pytest.raises(ModelError, match=r"holds b\.weight in weights\.safetensors and in another file"):
        open_checkpoint(tmp_path)


def test_a_tensor_listed_twice_is_named(tmp_path: Path) -> None:
    _sharded(tmp_path)
    text = '{"weight_map": {"a.weight": "model-1.safetensors", "a.weight": "model-2.safetensors"}}'
    (tmp_path / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    with pytest.raises(ModelError, match=r"'a\.weight' is given twice"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not JSON"), ("[]", "has no weight_map"), ('{"weight_map": {}}', "empty weight_map")],
)
def test_a_broken_index_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    with pytest.raises(ModelError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("left", [0, 5, 60, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, name: str, left: int) -> None:
    path = tmp_path / name
    save_file(TENSORS, path) if name.endswith("safetensors") else torch.save(TENSORS, path)
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(ModelError, match="is not a whole") as caught:
        open_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


class _Bomb:
    def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
        return (_explode, ("bang",))


def _explode(_text: str) -> None:
    raise AssertionError("code in a checkpoint was run")


def test_nothing_but_tensors_is_unpickled(tmp_path: Path) -> None:
    torch.save({"a.weight": _Bomb()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="holds more than tensors and is not unpickled") as caught:
        open_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [([torch.zeros(1)], "holds a list"), ({"model": {"a": torch.zeros(1)}}, "holds a dict under 'model'")],
)
def test_a_file_that_is_no_state_dict_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(ModelError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_another_dtype_is_refused_with_its_tensor(tmp_path: Path, name: str) -> None:
    held = {"x.weight": torch.zeros(2, dtype=torch.int32), "a.weight": torch.ones(2)}
    save_file(held, tmp_path / name) if name.endswith("safetensors") else torch.save(held, tmp_path / name)
    weights = open_checkpoint(tmp_path)
    assert weights.read("a.weight").sum() == 2
    for ask in (weights.read, weights.dtype):
        with pytest.raises(ModelError, match=r"^x\.weight in .* is (I32|int32); wanted bf16, fp16 or fp32"):
            ask("x.weight")


def test_no_weights_no_directory_no_such_tensor(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no weights in"):
        open_checkpoint(tmp_path)
    with pytest.raises(ModelError, match="is not a directory"):
        open_checkpoint(tmp_path / "absent")
    _one_safetensors(tmp_path)
    with pytest.raises(ModelError, match=r"no tensor q\.weight in .*; it has 3 others"):
        open_checkpoint(tmp_path).shape("q.weight")


def test_file_hashes_are_sha256_of_weights_index_and_config(tmp_path: Path) -> None:
    _sharded(tmp_path)
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "README.md").write_text("not hashed", encoding="utf-8")
    found = file_hashes(tmp_path)
    names = ["config.json", "model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json"]
    assert found == {name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in names}
    (tmp_path / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json"):
        file_hashes(tmp_path)


def test_the_tokenizer_hash_changes_with_its_files_alone(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no tokenizer in"):
        tokenizer_hash(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    seen = [tokenizer_hash(tmp_path)]
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    assert tokenizer_hash(tmp_path) == seen[0]
    for name in ("chat_template.jinja", "special_tokens_map.json"):
        for text in ("one", "two"):
            (tmp_path / name).write_text(text, encoding="utf-8")
            seen.append(tokenizer_hash(tmp_path))
    assert len(set(seen)) == 5


class _Opens:
    """Makes a file when it is unpickled by a reader that runs code."""

    def __init__(self, run: Callable[..., Any], *arguments: Any) -> None:
        self.made = run, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.made


@pytest.mark.parametrize("place", ["value", "key", "alone", "inside a tensor"])
@pytest.mark.parametrize("call", ["open", "system", "eval"])
def test_a_pickle_that_would_make_a_file_makes_none(tmp_path: Path, call: str, place: str) -> None:
    trap = tmp_path / "trap"
    bomb = {
        "open": _Opens(open, str(trap), "w"),
        "system": _Opens(os.system, f"touch {trap}"),
        "eval": _Opens(eval, f"open({str(trap)!r}, 'w')"),
    }[call]
    tensor = torch.zeros(2)
    tensor.hidden = bomb  # type: ignore[attr-defined]
    content: Any = {
        "value": {"a": bomb},
        "key": {bomb: tensor},
        "alone": bomb,
        "inside a tensor": {"a": tensor},
    }
    torch.save(content[place], tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError) as caught:
        open_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)
    assert not trap.exists()


ODD_MEMBERS: dict[str, Callable[[], Tensor]] = {
    "stride of 0": lambda: torch.zeros(1, 4).expand(10**12, 4),
    "no data": lambda: torch.zeros(2, device="meta"),
    "sparse": lambda: torch.eye(3).to_sparse(),
}


@pytest.mark.parametrize("name", ODD_MEMBERS)
def test_a_tensor_without_all_its_data_is_refused_before_it_is_read(tmp_path: Path, name: str) -> None:
    torch.save({"a.weight": ODD_MEMBERS[name]()}, tmp_path / "model.pt")
    with pytest.raises(ModelError, match=r"no plain tensor|not unpickled|not a whole"):
        open_checkpoint(tmp_path)


def test_an_archive_that_unpacks_to_more_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(TENSORS, path)
    with zipfile.ZipFile(path) as whole:
        members = [(info.filename, whole.read(info)) for info in whole.infolist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in members:
            packed.writestr(name, content + bytes(1 << 20))
    with pytest.raises(ModelError, match=r"'.*/data\.pkl' unpacks to 1,0"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("length", [26_000_000, 2**63, 2**64 - 1])
def test_a_header_beyond_its_file_or_memory_is_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", length))
        file.truncate(30_000_000)
    with pytest.raises(ModelError, match=f"a header of {length:,} bytes does not fit"):
        open_checkpoint(tmp_path)
