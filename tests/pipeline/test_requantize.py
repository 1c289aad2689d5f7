"""GGUF files made of GGUF files, held against llama.cpp and the gguf package."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFValueType
from torch import Tensor

from exlq.errors import ConfigError, ExlqError, InputError, ModelError, VerifyError
from exlq.evaluation.llamacpp import Runtime, available, quantize_chunk
from exlq.formats.gguf.imatrix import Entry, Imatrix, save
from exlq.formats.gguf.reader import GgufFile
from exlq.formats.gguf.recipes import Shape, recipe_named, recipe_types
from exlq.formats.gguf.values import KeyValue, TensorInfo
from exlq.formats.gguf.writer import GgufWriter
from exlq.formats.gguf_blocks import BLOCK_TYPES, FLOAT_TYPES, TYPES
from exlq.formats.gguf_blocks import fit as blocks_fit
from exlq.pipeline import requantize, requantize_tensors
from exlq.pipeline.progress import Progress, silent
from exlq.pipeline.requantize import Request
from tests.formats.gguf.exported import write_f32
from tests.pipeline.helpers import Events, contents

needs_llamacpp = pytest.mark.skipif(not available(), reason="llama.cpp is not installed (package xllamacpp)")

METADATA = [
    KeyValue("general.architecture", "llama", GGUFValueType.STRING),
    KeyValue("general.file_type", 0, GGUFValueType.UINT32),
    KeyValue("llama.block_count", 1, GGUFValueType.UINT32),
    KeyValue("llama.attention.head_count", 4, GGUFValueType.UINT32),
    KeyValue("llama.attention.head_count_kv", 1, GGUFValueType.UINT32),
    KeyValue("llama.expert_count", 3, GGUFValueType.UINT32),
    KeyValue("tokenizer.ggml.tokens", ["a", "é", ""], GGUFValueType.ARRAY, GGUFValueType.STRING),
    KeyValue("exlq.empty", [], GGUFValueType.ARRAY, GGUFValueType.INT32),
]
SHAPES = {
    "token_embd.weight": (40, 256),
    "output.weight": (40, 256),
    "blk.0.attn_v.weight": (20, 256),
    "blk.0.attn_q.weight": (20, 96),
    "blk.0.ffn_gate_inp.weight": (3, 256),
    "blk.0.ffn_down_exps.weight": (3, 10, 512),
    "blk.0.attn_norm.weight": (256,),
}


def random_tensors(scale: float = 0.02) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def write(
    path: Path, tensors: dict[str, Tensor], dtype: str = "F32", split_bytes: int | None = None
) -> Sequence[Path]:
    """Writes matrices as `dtype`, vectors as F32."""
    kinds = {name: dtype if value.ndim > 1 else "F32" for name, value in tensors.items()}
    infos = [TensorInfo(name, tuple(value.shape), kinds[name]) for name, value in tensors.items()]
    writer = GgufWriter(path, [e for e in METADATA if e.value != []], infos, split_bytes)
    for name, value in tensors.items():
        writer.add(name, value.to(FLOAT_TYPES[kinds[name]].dtype))
    return writer.close()


def write_imatrix(path: Path, shapes: dict[str, tuple[int, ...]], tokens: float = 100.0) -> Imatrix:
    """Importance that differs from channel to channel and from expert to expert, for all matrices."""
    generator = torch.Generator().manual_seed(11)
    entries = {}
    for name, shape in shapes.items():
        n_mat = shape[0] if len(shape) == 3 else 1
        sums = tokens * torch.rand(n_mat, shape[-1], generator=generator).pow(4) + 0.1
        entries[name] = Entry(sums, torch.full((n_mat,), tokens))
    made = Imatrix(entries, ("/home/somebody/wiki.train.raw",), chunk_count=7, chunk_size=512)
    save(made, path)
    return made


def matrices(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in shapes.items() if len(shape) > 1}


def quantize(source: Path, target: Path, kind: str, progress: Progress = silent, **more: Any) -> list[Path]:
    with requantize.prepared(Request(source, target, kind, **{"search": "fast", **more})) as job:
        paths = requantize.run(job, progress)
    assert sum(path.stat().st_size for path in paths) == job.n_bytes
    return list(paths)


def notes(source: Path, target: Path, kind: str, **more: Any) -> tuple[str, ...]:
    with requantize.prepared(Request(source, target, kind, **more)) as job:
        return job.notes


def types_of(path: Path) -> dict[str, str]:
    with GgufFile(path) as file:
        return {name: info.type for name, info in file.tensors.items()}


def stored(path: Path) -> dict[str, tuple[str, bytes]]:
    """Type and bytes of every tensor of a single file, as the gguf package reads them."""
    tensors = gguf.GGUFReader(path).tensors
    return {tensor.name: (tensor.tensor_type.name, tensor.data.tobytes()) for tensor in tensors}


def weights(path: Path, name: str) -> Tensor:
    """A tensor of a single file as gguf's own dequantizer has it."""
    tensor = next(tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == name)
    return torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type)))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small") / "small-F32.gguf"
    write(path, random_tensors())
    return path


@pytest.fixture(scope="module")
def small_imatrix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("imatrix") / "small.imatrix.gguf"
    write_imatrix(path, matrices(SHAPES))
    return path


@pytest.fixture(scope="module")
def trained(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model as an F32 file."""
    return write_f32(tiny_llama, tmp_path_factory.mktemp("trained") / "tiny-F32.gguf")[0]


def weighted_error(found: Tensor, wanted: Tensor, importance: Tensor) -> float:
    return float(((found.double() - wanted.double()).square() * importance.double()).sum())


@needs_llamacpp
@pytest.mark.parametrize(
    ("kind", "search"), [("Q4_K_M", "best"), ("Q3_K_M", "fast"), ("Q2_K", "best"), ("IQ4_NL", "fast")]
)
def test_no_tensor_has_more_weighted_error_than_llama_quantize_leaves(
    kind: str, search: str, trained: Path, tmp_path: Path
) -> None:
    with GgufFile(trained) as file:
        shapes = {name: info.shape for name, info in file.tensors.items() if len(info.shape) > 1}
    imatrix = write_imatrix(tmp_path / "imatrix.dat", shapes)
    quantize(trained, tmp_path / "out.gguf", kind, imatrix=tmp_path / "imatrix.dat", search=search)
    types = types_of(tmp_path / "out.gguf")
    for name in shapes:
        importance, wanted = imatrix.importance(name), weights(trained, name)
        assert importance is not None
        stock = BLOCK_TYPES[types[name]].unpack(quantize_chunk(types[name], wanted, importance))
        ours = weighted_error(weights(tmp_path / "out.gguf", name), wanted, importance)
        assert ours <= weighted_error(stock, wanted, importance), (name, types[name])


def test_the_best_search_is_the_default_and_leaves_less_error_than_the_fast_one(
    small: Path, tmp_path: Path
) -> None:
    name = "blk.0.ffn_down_exps.weight"
    wanted, errors = random_tensors()[name], {}
    for search in ("best", "fast"):
        quantize(small, tmp_path / f"{search}.gguf", "Q8_0", search=search)
        errors[search] = float((weights(tmp_path / f"{search}.gguf", name) - wanted).square().sum())
    assert errors["best"] < 0.99 * errors["fast"], errors
    assert Request(small, small, "Q8_0").search == "best"


@needs_llamacpp
@pytest.mark.parametrize("kind", ["Q8_0", "Q6_K", "F16"])
def test_the_file_runs_in_llama_cpp_with_logits_near_those_of_the_input(
    kind: str, trained: Path, tmp_path: Path
) -> None:
    quantize(trained, tmp_path / "out.gguf", kind)
    ids = torch.randint(4, 2000, (48,), generator=torch.Generator().manual_seed(3))
    with Runtime(trained, context=64) as before, Runtime(tmp_path / "out.gguf", context=64) as after:
        wanted, found = before.logits(ids), after.logits(ids)
    assert (found - wanted).square().mean().sqrt() < 0.1 * wanted.std()


@pytest.mark.parametrize("with_imatrix", [False, True])
@pytest.mark.parametrize("kind", ["Q4_K_M", "Q2_K", "Q4_0", "IQ4_XS", "Q8_0", "BF16"])
def test_types_are_those_of_the_recipe_and_what_is_not_quantized_stays(
    kind: str, with_imatrix: bool, small: Path, small_imatrix: Path, tmp_path: Path
) -> None:
    quantize(small, tmp_path / "out.gguf", kind, imatrix=small_imatrix if with_imatrix else None)
    with GgufFile(small) as file:
        wanted = recipe_types(
            recipe_named(kind),
            list(file.tensors.values()),
            Shape("llama", 1, 4, 1, 3),
            imatrix=with_imatrix,
        )
    assert types_of(tmp_path / "out.gguf") == wanted
    for name in ("blk.0.attn_norm.weight", "blk.0.ffn_gate_inp.weight"):
        assert stored(tmp_path / "out.gguf")[name] == stored(small)[name]


@needs_llamacpp
def test_every_expert_is_weighted_with_its_own_importance(
    small: Path, small_imatrix: Path, tmp_path: Path
) -> None:
    name = "blk.0.ffn_down_exps.weight"
    quantize(small, tmp_path / "out.gguf", "Q2_K", imatrix=small_imatrix, pure=True)
    importance = write_imatrix(tmp_path / "again.gguf", matrices(SHAPES)).importance(name)
    assert importance is not None
    found, wanted = weights(tmp_path / "out.gguf", name), random_tensors()[name]
    for expert in range(3):
        ours = weighted_error(found[expert], wanted[expert], importance[expert])
        stock = BLOCK_TYPES["Q2_K"].unpack(quantize_chunk("Q2_K", wanted[expert], importance[expert]))
        assert ours <= weighted_error(stock, wanted[expert], importance[expert])


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_half_precision_inputs_are_rounded_from_what_they_hold(dtype: str, tmp_path: Path) -> None:
    held = {
        name: value.to(FLOAT_TYPES[dtype].dtype).float() if value.ndim > 1 else value
        for name, value in random_tensors().items()
    }
    write(tmp_path / "half.gguf", held, dtype)
    write(tmp_path / "float.gguf", held)
    quantize(tmp_path / "half.gguf", tmp_path / "a.gguf", "Q4_K_S")
    quantize(tmp_path / "float.gguf", tmp_path / "b.gguf", "Q4_K_S")
    kept = "blk.0.ffn_gate_inp.weight"
    a, b = stored(tmp_path / "a.gguf"), stored(tmp_path / "b.gguf")
    assert a.pop(kept)[0] == dtype
    assert b.pop(kept)[0] == "F32"
    assert a == b


def test_flags_give_the_types_that_llama_quantize_gives(small: Path, tmp_path: Path) -> None:
    def types(kind: str = "Q4_K_M", **more: Any) -> dict[str, str]:
        quantize(small, tmp_path / "out.gguf", kind, **more)
        return types_of(tmp_path / "out.gguf")

    pure = types(pure=True)
    assert {pure[n] for n in SHAPES if n not in ("blk.0.attn_norm.weight", "blk.0.ffn_gate_inp.weight")} == {
        "Q4_K",
        "Q5_0",
    }
    assert types(leave_output=True)["output.weight"] == "F32"
    assert types(output_tensor_type="q8_0")["output.weight"] == "Q8_0"
    assert types(token_embedding_type="q5_1")["token_embd.weight"] == "Q5_1"
    assert types(tensor_types=("attn_v=q3_K",))["blk.0.attn_v.weight"] == "Q3_K"
    assert types("F16", tensor_types=("attn_v=q3_K",))["blk.0.attn_v.weight"] == "F16"


def test_metadata_are_the_inputs_with_what_quantization_changes(
    small: Path, small_imatrix: Path, tmp_path: Path
) -> None:
    items = ("llama.rope.freq_base=float:1234.5", "a.b=str:c=d:e", "n=int:7", "m=int:-1", "t=bool:true")
    quantize(small, tmp_path / "out.gguf", "Q5_K_S", imatrix=small_imatrix, override_kv=items)
    found = {
        key: (field.contents(), field.types[0])
        for key, field in gguf.GGUFReader(tmp_path / "out.gguf").fields.items()
        if not key.startswith("GGUF.")
    }
    kept = {e.key: (e.value, e.type) for e in METADATA if e.value != [] and e.key != "general.file_type"}
    text, number = GGUFValueType.STRING, GGUFValueType.UINT32
    assert found == {
        **kept,
        "general.file_type": (16, number),
        "general.quantization_version": (2, number),
        "quantize.imatrix.file": ("small.imatrix.gguf", text),
        "quantize.imatrix.dataset": ("/home/somebody/wiki.train.raw", text),
        "quantize.imatrix.entries_count": (len(matrices(SHAPES)), number),
        "quantize.imatrix.chunks_count": (7, number),
        "llama.rope.freq_base": (1234.5, GGUFValueType.FLOAT32),
        "a.b": ("c=d:e", text),
        "n": (7, number),
        "m": (-1, GGUFValueType.INT32),
        "t": (True, GGUFValueType.BOOL),
    }


def test_entries_are_picked_by_parts_of_their_names_and_the_rest_is_unweighted(
    small: Path, small_imatrix: Path, tmp_path: Path
) -> None:
    quantize(small, tmp_path / "plain.gguf", "Q4_K_S")
    quantize(small, tmp_path / "in.gguf", "Q4_K_S", imatrix=small_imatrix, include=("attn_v", "output"))
    quantize(small, tmp_path / "out.gguf", "Q4_K_S", imatrix=small_imatrix, exclude=("attn_v", "output"))
    plain, included, excluded = (stored(tmp_path / f"{name}.gguf") for name in ("plain", "in", "out"))
    rounded = [name for name in SHAPES if plain[name][0] not in ("F32", "Q8_0")]
    assert len(rounded) > 3
    for name in rounded:
        picked = "attn_v" in name or "output" in name
        assert (included[name] != plain[name]) == picked, name
        assert (excluded[name] == plain[name]) == picked, name
    found = notes(small, tmp_path / "x.gguf", "Q4_K_S", imatrix=small_imatrix, exclude=("attn_v", "output"))
    assert len(found) == 1
    assert "2 of 5 tensors" in found[0]
    assert "blk.0.attn_v.weight" in found[0]


@pytest.mark.parametrize("keep_split", [False, True])
def test_shards_in_and_copied_leave_every_byte_of_every_tensor(
    keep_split: bool, small: Path, tmp_path: Path
) -> None:
    shards = quantize(small, tmp_path / "split.gguf", "COPY", split_bytes=50_000)
    assert len(shards) > 2
    copied = quantize(shards[0], tmp_path / "copy.gguf", "copy", keep_split=keep_split)
    if keep_split:
        assert [path.name.replace("copy", "split") for path in copied] == [path.name for path in shards]
        assert [list(stored(path)) for path in copied] == [list(stored(path)) for path in shards]
    whole = {name: value for path in copied for name, value in stored(path).items()}
    assert whole == stored(small)
    with GgufFile(copied[0]) as file, GgufFile(small) as wanted:
        layout = {key for key in file.metadata if key.startswith("split.")}
        assert {key: file.metadata[key] for key in file.metadata if key not in layout} == dict(
            wanted.metadata
        )


def test_a_first_shard_without_tensors_is_kept(small: Path, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(None, "llama", split_max_tensors=3, small_first_shard=True)
    for name, value in random_tensors().items():
        writer.add_tensor(name, value.numpy())
    writer.write_header_to_file(tmp_path / "in.gguf")
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    shards = sorted(tmp_path.glob("in-*.gguf"))
    assert stored(shards[0]) == {}
    copied = quantize(shards[0], tmp_path / "out.gguf", "COPY", keep_split=True)
    assert [stored(path) for path in copied] == [stored(path) for path in shards]


def test_shards_quantized_hold_the_tensors_of_the_single_file(small: Path, tmp_path: Path) -> None:
    shards = quantize(small, tmp_path / "split.gguf", "COPY", split_bytes=50_000)
    whole = stored(quantize(small, tmp_path / "whole.gguf", "Q4_K_M")[0])
    made = quantize(shards[0], tmp_path / "q.gguf", "Q4_K_M", keep_split=True)
    assert len(made) == len(shards)
    assert {name: value for path in made for name, value in stored(path).items()} == whole
    assert stored(quantize(shards[0], tmp_path / "one.gguf", "Q4_K_M")[0]) == whole


def test_large_tensors_are_worked_on_in_slabs_and_come_out_the_same(
    small: Path, small_imatrix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = quantize(small, tmp_path / "whole.gguf", "Q4_K_M", imatrix=small_imatrix)
    sizes: list[int] = []
    real_fit, real_read = blocks_fit.fit, GgufFile.read

    def fit(kind: Any, weight: Tensor, *rest: Any, **more: Any) -> Any:
        sizes.append(weight.numel())
        return real_fit(kind, weight, *rest, **more)

    def read(self: GgufFile, name: str, rows: Any = None) -> Tensor:
        found = real_read(self, name, rows)
        sizes.append(found.numel() // 4)
        return found

    monkeypatch.setattr(requantize_tensors, "SLAB_WEIGHTS", 1024)
    monkeypatch.setattr(requantize_tensors, "SAMPLED_ROWS", 3)
    monkeypatch.setattr(requantize, "MAPPED_BYTES", 1)
    monkeypatch.setattr(requantize_tensors, "fit", fit)
    monkeypatch.setattr(GgufFile, "read", read)
    slabs = quantize(small, tmp_path / "slabs.gguf", "Q4_K_M", imatrix=small_imatrix)
    assert slabs[0].read_bytes() == whole[0].read_bytes()
    assert len(sizes) > 50
    assert max(sizes) <= 10 * 512  # one expert


@pytest.mark.parametrize(
    ("kind", "scale", "wanted"),
    [
        ("Q6_K", 0.02, "Q6_K"),
        ("Q6_K", 2e-6, "Q8_0"),
        ("Q8_0", 1e-5, "F16"),
        ("Q6_K", 1e-9, "BF16"),
        ("F16", 0.02, "F16"),
        ("F16", 1e-9, "BF16"),
        ("F16", 1e5, "BF16"),
    ],
)
def test_weights_out_of_reach_of_a_type_get_one_that_holds_them(
    kind: str, scale: float, wanted: str, tmp_path: Path
) -> None:
    name = "blk.0.attn_v.weight"
    tensors = random_tensors() | {name: random_tensors(scale)[name]}
    write(tmp_path / "in.gguf", tensors, "BF16")
    found = notes(tmp_path / "in.gguf", tmp_path / "out.gguf", kind)
    quantize(tmp_path / "in.gguf", tmp_path / "out.gguf", kind)
    assert types_of(tmp_path / "out.gguf")[name] == wanted
    assert [name in note and wanted in note for note in found] == ([] if wanted == kind else [True])
    lost = (weights(tmp_path / "out.gguf", name) - tensors[name]).norm() / tensors[name].norm()
    assert lost < 0.03


def test_what_is_quantized_already_is_refused_without_leave(small: Path, tmp_path: Path) -> None:
    quantize(small, tmp_path / "q8.gguf", "Q8_0")
    with pytest.raises(ConfigError, match=r"weight is quantized already, to Q8_0: .* --allow-requantize"):
        quantize(tmp_path / "q8.gguf", tmp_path / "q4.gguf", "Q4_0")
    quantize(tmp_path / "q8.gguf", tmp_path / "q4.gguf", "Q4_0", allow_requantize=True)
    assert types_of(tmp_path / "q4.gguf")["blk.0.attn_v.weight"] == "Q4_0"
    quantize(tmp_path / "q8.gguf", tmp_path / "again.gguf", "Q8_0")  # nothing changes
    assert stored(tmp_path / "again.gguf") == stored(tmp_path / "q8.gguf")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("row", [0, 7])
@pytest.mark.parametrize("kind", ["Q4_K_M", "F16"])
def test_a_weight_that_is_not_finite_is_an_error_with_its_tensors_name(
    kind: str, bad: float, row: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requantize_tensors, "SAMPLED_ROWS", 2)  # so that row 7 is met in the work
    tensors = random_tensors()
    tensors["blk.0.attn_v.weight"][row, 3] = bad
    write(tmp_path / "in.gguf", tensors)
    before = contents(tmp_path)
    with pytest.raises(ModelError, match=r"blk\.0\.attn_v\.weight: .*not finite"):
        quantize(tmp_path / "in.gguf", tmp_path / "out.gguf", kind)
    assert contents(tmp_path) == before


def test_a_file_that_is_not_what_was_meant_is_not_put_in_place(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = GgufWriter.close

    def close(self: GgufWriter) -> tuple[Path, ...]:
        paths = real(self)
        content = paths[0].read_bytes()
        paths[0].write_bytes(content[:-40] + bytes([content[-40] ^ 1]) + content[-39:])
        return paths

    monkeypatch.setattr(GgufWriter, "close", close)
    with pytest.raises(VerifyError, match="not what was written"):
        quantize(small, tmp_path / "out.gguf", "Q4_0")
    assert list(tmp_path.iterdir()) == []


def test_metadata_given_by_hand_have_the_last_word(small: Path, tmp_path: Path) -> None:
    quantize(small, tmp_path / "out.gguf", "Q4_0", override_kv=("general.file_type=int:1026",))
    assert gguf.GGUFReader(tmp_path / "out.gguf").fields["general.file_type"].contents() == 1026


def test_an_interruption_leaves_what_was_there(small: Path, tmp_path: Path) -> None:
    (tmp_path / "out.gguf").write_bytes(b"an older file")
    with pytest.raises(KeyboardInterrupt):
        quantize(small, tmp_path / "out.gguf", "Q4_K_M", progress=Events(stop_at=("writing", 3)))
    assert contents(tmp_path) == {"out.gguf": b"an older file"}


def test_an_entry_of_another_size_is_an_error_with_its_tensors_name(small: Path, tmp_path: Path) -> None:
    write_imatrix(tmp_path / "im.gguf", matrices(SHAPES) | {"blk.0.attn_v.weight": (20, 512)})
    with pytest.raises(ModelError, match=r"512.* for blk\.0\.attn_v\.weight, want .*256"):
        quantize(small, tmp_path / "out.gguf", "Q4_K_M", imatrix=tmp_path / "im.gguf")
    write_imatrix(tmp_path / "im.gguf", {"blk.9.attn_v.weight": (20, 256)})
    with pytest.raises(ModelError, match="one made for this model"):
        quantize(small, tmp_path / "out.gguf", "Q4_K_M", imatrix=tmp_path / "im.gguf")


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("Q2_K_S", {}, "importance matrix"),
        ("Q9_K", {}, "no GGUF type"),
        ("COPY", {"pure": True}, "COPY changes no type"),
        ("Q4_0", {"include": ("a",)}, "--imatrix"),
        ("Q4_0", {"include": ("a",), "exclude": ("b",)}, "exclude one another"),
        ("Q4_0", {"keep_split": True, "split_bytes": 9}, "exclude one another"),
        ("Q4_0", {"override_kv": ("a",)}, "KEY=TYPE:VALUE"),
        ("Q4_0", {"override_kv": ("a=int:1.5",)}, "is no int"),
        ("Q4_0", {"override_kv": ("a=int:4294967296",)}, "is no int"),
        ("Q4_0", {"override_kv": ("a=bool:1",)}, "is no bool"),
        ("Q4_0", {"override_kv": ("split.no=int:1",)}, "leave it out"),
        ("Q4_0", {"imatrix": Path("absent.dat")}, "cannot be read"),
        ("Q4_0", {"target": Path("absent") / "out.gguf"}, "no directory"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    kind: str, more: dict[str, Any], message: str, small: Path, tmp_path: Path
) -> None:
    target = tmp_path / more.pop("target", "out.gguf") if "target" in more else tmp_path / "out.gguf"
    with pytest.raises(InputError, match=message) as caught:
        quantize(small, target, kind, **more)
    assert "\n" not in str(caught.value)
    assert contents(tmp_path) == {}


def test_the_input_is_never_written_over(small: Path, tmp_path: Path) -> None:
    shards = quantize(small, tmp_path / "split.gguf", "COPY", split_bytes=50_000)
    link = tmp_path / "link.gguf"
    link.symlink_to(small)
    before = contents(tmp_path)
    for source, target, keep_split in (
        (small, small, False),
        (small, link, False),
        (shards[0], shards[1], False),
        (shards[0], tmp_path / "split.gguf", True),
    ):
        with pytest.raises(ConfigError, match="is the input"):
            quantize(source, target, "COPY", keep_split=keep_split)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("content", [None, b"", b"GGUF", b"not a model at all"])
def test_what_is_no_gguf_file_is_an_input_error(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "in.gguf").write_bytes(content)
    with pytest.raises(InputError):
        quantize(tmp_path / "in.gguf", tmp_path / "out.gguf", "Q4_0")


def test_a_recipe_wants_to_know_the_number_of_blocks_but_pure_types_do_not(tmp_path: Path) -> None:
    data = torch.ones(4, 256)
    info = TensorInfo("blk.0.attn_v.weight", (4, 256), "F32")
    writer = GgufWriter(tmp_path / "in.gguf", METADATA[:1], [info])
    writer.add(info.name, data)
    writer.close()
    for pure, expected in (
        (False, pytest.raises(ExlqError, match=r"llama\.block_count")),
        (True, nullcontext()),
    ):
        with expected:
            quantize(tmp_path / "in.gguf", tmp_path / "out.gguf", "Q4_K_M", pure=pure)
    assert TYPES[types_of(tmp_path / "out.gguf")[info.name]].name == "Q4_K"
