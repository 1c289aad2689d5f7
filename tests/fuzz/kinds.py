"""What is attacked: every kind of file, how its mutants are made, and what commands do with them."""

from __future__ import annotations

import io
import json
import mmap
import random
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file

from exlq import calibration, measurement
from exlq.checkpoint.open import open_checkpoint
from exlq.doctor import diagnose
from exlq.files import read_json
from exlq.formats.gguf import imatrix
from exlq.formats.gguf.header import read_header
from exlq.inspect import inspect
from exlq.models.open import open_model
from exlq.pipeline import job
from exlq.pipeline.requantize import Request, prepared
from exlq.pipeline.requantize import run as requantize
from exlq.recipes import stored
from exlq.recipes.solve import Targets, frontiers, solve
from tests.fuzz import binary_mutants
from tests.fuzz.json_mutants import mutated_text
from tests.fuzz.parquet_mutants import parquet
from tests.fuzz.valid import FAMILIES, Valid
from tests.pipeline.helpers import settings

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Kind:
    """`make` writes a mutant and gives its path; `first` is the first check, `uses` what commands do with it.

    `commands` are tried on the path instead, {} in place of it.
    """

    make: Callable[[Valid, random.Random], Path]
    first: Callable[[Path], Any]
    uses: tuple[Callable[[Path, Valid], Any], ...]
    commands: tuple[str, ...]


def _in_model(name: str, mutate: Callable[[bytes, random.Random], bytes]) -> Callable[..., Path]:
    def make(valid: Valid, rng: random.Random) -> Path:
        source = valid.directory / "sharded" if "index" in name else valid.model
        return valid.mutant_of(name, mutate((source / name).read_bytes(), rng))

    return make


def _alone(name: str, mutate: Callable[[bytes, random.Random], bytes]) -> Callable[..., Path]:
    def make(valid: Valid, rng: random.Random) -> Path:
        path = valid.scratch / name
        path.write_bytes(mutate((valid.directory / name).read_bytes(), rng))
        return path

    return make


def _json(content: bytes, rng: random.Random) -> bytes:
    return mutated_text(content.decode(), rng)


def _config(valid: Valid, rng: random.Random) -> Path:
    """Of one of several families."""
    whole = valid.directory / rng.choice(("whole", *FAMILIES))
    return valid.mutant_of("config.json", _json((whole / "config.json").read_bytes(), rng), whole)


def _job(valid: Valid, rng: random.Random) -> Path:
    made = valid.scratch / "job"
    made.mkdir(exist_ok=True)
    (made / "summary.json").write_bytes(_json((valid.directory / "job" / "summary.json").read_bytes(), rng))
    return made


def _pickle(valid: Valid, rng: random.Random) -> Path:
    """A state dict with odd members, or the bytes of the archive broken, most often those of its pickle."""
    tensors: dict[Any, Any] = dict(load_file(valid.model / "model.safetensors"))
    name = rng.choice(list(tensors))
    if rng.random() < 0.5:
        whole = tensors[name]
        odd: list[Any] = [None, 1, "text", [whole], {"a": whole}, re.compile, torch.nn.Parameter(whole)]
        odd += [whole.double(), whole.to(torch.complex64), whole.bool(), whole[:0], torch.tensor(1.0)]
        odd += [whole.to_sparse(), whole.to("meta"), whole[:1].expand(10**9, *whole.shape[1:])]
        tensors[rng.choice((name, name, 7, "", f"{name}x"))] = rng.choice(odd)
    file = io.BytesIO()
    torch.save(tensors, file)
    content = file.getvalue()
    begin = content.index(b"data.pkl")
    if rng.random() < 0.4:
        content = _changed(content, begin + 8, content.index(b"PK", begin), rng)
    elif rng.random() < 0.1:
        content = _changed(content, len(content) - 4000, len(content), rng)
    made = valid.mutant_of("pytorch_model.bin", content)
    (made / "model.safetensors").unlink()
    return made


def _changed(content: bytes, begin: int, end: int, rng: random.Random) -> bytes:
    """Some bytes in a range are others."""
    made = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(begin, end)
        made[at] = rng.choice((made[at] ^ 1 << rng.randrange(8), rng.randrange(256)))
    return bytes(made)


def _parquet(valid: Valid, rng: random.Random) -> Path:
    path = valid.scratch / "mutant.parquet"
    parquet(path, rng)
    return path


def _tokenizer(valid: Valid, rng: random.Random) -> Path:
    return _in_model(rng.choice(("tokenizer.json", "tokenizer.json", "tokenizer_config.json")), _json)(
        valid, rng
    )


def _header(path: Path) -> None:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        read_header(data)


def _safetensors_header(path: Path) -> None:
    """The header is JSON of the length that is said, before what it says is believed."""
    content = (path / "model.safetensors").read_bytes()
    json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def _inspect(path: Path, _valid: Valid) -> None:
    inspect(path)


def _read_weights(path: Path, _valid: Valid) -> None:
    weights = open_checkpoint(path)
    for key in weights.keys():  # noqa: SIM118
        weights.shape(key), weights.dtype(key)
        weights.read(key)
        if len(weights.shape(key)) > 1:
            weights.read(key, slice(0, 2))
    model = open_model(path, weights, device=CPU)
    with model.block(0):
        pass


def _open_model(path: Path, _valid: Valid) -> None:
    open_model(path, open_checkpoint(path), device=CPU)


def _rehearse(path: Path, valid: Valid, **changes: Any) -> None:
    plain: dict[str, Any] = {"bits": None, "formats": ("gguf",), "measure": None, "gguf_type": "Q4_K_M"}
    job.rehearse(settings(path, valid.scratch / "out", valid.ids, **{**plain, **changes}))


def _tokenize(path: Path, valid: Valid) -> None:
    tokenizer = calibration.load_tokenizer(path)
    calibration.read_stream(valid.text, tokenizer)


def _read_text(path: Path, valid: Valid) -> None:
    tokenizer = TOKENIZERS.setdefault(valid.model, calibration.load_tokenizer(valid.model))
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ': ' + m['content'] }}\n{% endfor %}"
    stream = calibration.read_stream(path, tokenizer)
    calibration.cut_rows(stream, 8, 16, "hash")


def _diagnose(path: Path, _valid: Valid) -> None:
    diagnose(path)


TOKENIZERS: dict[Path, Any] = {}


def _requantize(path: Path, valid: Valid) -> None:
    target = valid.scratch / "made.gguf"
    with prepared(Request(path, target, "Q4_0", allow_requantize=True)) as made:
        requantize(made, lambda *_: None)
    target.unlink()


def _prepare(path: Path, valid: Valid) -> None:
    with prepared(Request(path, valid.scratch / "made.gguf", "Q4_K_M", allow_requantize=True)):
        pass


def _read_imatrix(path: Path, valid: Valid) -> None:
    found = imatrix.load(path)
    _ = [found.importance_for(name, (64, 64)) for name in found.entries]
    source, target = valid.directory / "model.gguf", valid.scratch / "made.gguf"
    with prepared(Request(source, target, "Q4_0", imatrix=path)):
        pass


def _solve(path: Path, _valid: Valid) -> None:
    record = measurement.load(path)
    solve(record, Targets(bits=(5.0,)))
    frontiers(record)


def _convert_measured(path: Path, valid: Valid) -> None:
    plain: dict[str, Any] = {"formats": None, "gguf_type": None, "bits": 5.0, "force_measurement": True}
    _rehearse(valid.model, valid, measurement=path, **plain)


def _read_recipe(path: Path, valid: Valid) -> None:
    stored.load(path)
    _rehearse(valid.model, valid, recipe=path, gguf_type=None, formats=None)


KINDS: Mapping[str, Kind] = {
    "safetensors": Kind(
        _in_model("model.safetensors", binary_mutants.safetensors),
        _safetensors_header,
        (_inspect, _read_weights, _rehearse),
        ("inspect {}", "inspect {}/model.safetensors", "{convert} -i {}"),
    ),
    "index": Kind(
        _in_model("model.safetensors.index.json", _json),
        lambda path: read_json(path / "model.safetensors.index.json"),
        (_inspect, _read_weights),
        ("inspect {}", "{convert} -i {}"),
    ),
    "pickle": Kind(
        _pickle,
        lambda path: zipfile.ZipFile(path / "pytorch_model.bin").close(),
        (_read_weights,),
        ("{convert} -i {}",),
    ),
    "config": Kind(
        _config,
        lambda path: read_json(path / "config.json"),
        (_inspect, _open_model, _rehearse),
        ("inspect {}", "plan {}", "{convert} -i {}"),
    ),
    "tokenizer": Kind(
        _tokenizer,
        lambda path: [read_json(path / name) for name in ("tokenizer.json", "tokenizer_config.json")],
        (_tokenize, _rehearse),
        ("{convert} -i {}", "doctor {text} --model {}"),
    ),
    "parquet": Kind(
        _parquet, pq.ParquetFile, (_read_text, _diagnose), ("doctor {}", "{convert} -i {model} -c {}")
    ),
    "gguf": Kind(
        _alone("model.gguf", binary_mutants.gguf),
        _header,
        (_inspect, _prepare, _requantize),
        ("inspect {}", "quantize {} {out} Q4_0"),
    ),
    "imatrix-gguf": Kind(
        _alone("imatrix.gguf", binary_mutants.gguf),
        _header,
        (_read_imatrix,),
        ("quantize --imatrix {} {gguf} {out} Q4_0",),
    ),
    "imatrix-dat": Kind(
        _alone("imatrix.dat", binary_mutants.dat),
        imatrix.load,
        (_read_imatrix,),
        ("quantize --imatrix {} {gguf} {out} Q4_0",),
    ),
    "measurement": Kind(
        _alone("measurement.json", _json),
        read_json,
        (_inspect, _solve, _convert_measured),
        ("inspect {}", "solve {} -b 5", "{convert} -i {model} -m {}"),
    ),
    "recipe": Kind(
        _alone("recipe.json", _json), read_json, (_read_recipe,), ("{convert} -i {model} --recipe {}",)
    ),
    "summary": Kind(
        _job, lambda path: read_json(path / "summary.json"), (_inspect,), ("inspect {}", "report {}")
    ),
}
