"""EXL2 directories, made by hand as another tool would and by our writer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from exlq.errors import FormatError, ModelError
from exlq.formats.exl2_directory import Exl2Weights, Exl2Writer, check_linear, is_exl2

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 96,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 24,
    "intermediate_size": 64,
    "vocab_size": 50,
}
Q_PROJ = "model.layers.0.self_attn.q_proj"
GROUPS = ((8, 32), (4, 32), (2, 32))  # bits and rows


def slow_linear(
    columns: int, groups: Sequence[tuple[int, int]] = GROUPS, seed: int = 0
) -> tuple[Any, Tensor]:
    """The five tensors of random content, bit by bit, and the weight in float16, (columns, rows)."""
    rng = np.random.default_rng(seed)
    rows = sum(size for _, size in groups)
    words: list[np.ndarray[Any, Any]] = []
    pairs, weight = [], np.zeros((rows, columns), np.float16)
    codes = rng.integers(0, 16, (len(groups), columns))
    largest = rng.uniform(0.05, 2, len(groups)).astype(np.float16)
    begin = 0
    for group, (bits, size) in enumerate(groups):
        pairs += [bits, len(words)]
        levels = rng.integers(0, 1 << bits, (size, columns))
        multiplier = np.float16(np.float32(largest[group]) / 256)
        scales = ((codes[group] + 1) ** 2).astype(np.float16) * multiplier
        weight[begin : begin + size] = (levels - (1 << (bits - 1))).astype(np.float16) * scales
        stream = [[int(level) >> bit & 1 for level in row] for row in levels for bit in range(bits)]
        for first in range(0, len(stream), 32):
            word = sum(np.array(stream[first + bit], dtype=np.uint64) << np.uint64(bit) for bit in range(32))
            words.append(np.asarray(word).astype(np.uint32))
        begin += size
    nibbles = sum(codes[:, part::8].astype(np.uint64) << np.uint64(4 * part) for part in range(8))
    inverse = rng.permutation(rows)
    tensors = {
        "q_weight": torch.from_numpy(np.stack(words).view(np.int32)),
        "q_scale": torch.from_numpy(np.asarray(nibbles).astype(np.uint32).view(np.int32)),
        "q_scale_max": torch.from_numpy(largest),
        "q_groups": torch.tensor(pairs, dtype=torch.int16),
        "q_invperm": torch.from_numpy(inverse.astype(np.int32)),
    }
    return tensors, torch.from_numpy(weight[inverse].T.copy())


def others_directory(directory: Path, tensors: dict[str, Tensor]) -> Path:
    directory.mkdir(exist_ok=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "output.safetensors"
    )
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return directory


def named(key: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{key}.{suffix}": tensor for suffix, tensor in tensors.items()}


def test_a_directory_of_another_tool_is_read_bit_for_bit_under_hugging_face_names(tmp_path: Path) -> None:
    query, query_weight = slow_linear(64, seed=1)
    head, head_weight = slow_linear(64, [(5, 64), (3, 32)], seed=2)
    bias = torch.arange(64).half()
    plain = {"model.norm.weight": torch.rand(96).half(), "other.weight": torch.rand(3).bfloat16()}
    extra = {f"{Q_PROJ}.bias": bias, f"{Q_PROJ}.q_perm": torch.zeros(96, dtype=torch.int32)}
    others_directory(tmp_path, named(Q_PROJ, query) | extra | plain)
    save_file(named("lm_head", head), tmp_path / "more.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"stale": "nowhere.safetensors"}}')

    weights = Exl2Weights(tmp_path)

    assert is_exl2(tmp_path)
    assert set(weights.keys()) == {f"{Q_PROJ}.weight", f"{Q_PROJ}.bias", "lm_head.weight", *plain}
    assert weights.shape(f"{Q_PROJ}.weight") == (48, 96)
    assert weights.shape("lm_head.weight") == (50, 96)
    assert weights.shape(f"{Q_PROJ}.bias") == (48,)
    assert weights.dtype("lm_head.weight") == torch.float16
    assert torch.equal(weights.read(f"{Q_PROJ}.weight"), query_weight[:48])
    assert torch.equal(weights.read("lm_head.weight"), head_weight[:50])
    assert torch.equal(weights.read(f"{Q_PROJ}.bias"), bias[:48])
    for name, tensor in plain.items():
        assert (weights.dtype(name), weights.shape(name)) == (tensor.dtype, tuple(tensor.shape))
        assert torch.equal(weights.read(name), tensor)


@pytest.mark.parametrize("rows", [slice(3, 9), slice(None, None, 7), torch.tensor([5, 0, 5])])
def test_rows_are_those_of_the_whole(rows: slice | Tensor, tmp_path: Path) -> None:
    tensors, weight = slow_linear(64)
    plain = torch.rand(50, 4)
    others_directory(tmp_path, named("lm_head", tensors) | {"model.embed_tokens.weight": plain})

    weights = Exl2Weights(tmp_path)

    assert torch.equal(weights.read("lm_head.weight", rows), weight[:50][rows])
    assert torch.equal(weights.read("model.embed_tokens.weight", rows), plain[rows])


def test_sizes_that_config_json_does_not_explain_leave_the_padding_on(tmp_path: Path) -> None:
    tensors, weight = slow_linear(128)
    others_directory(tmp_path, named("lm_head", tensors))

    assert torch.equal(Exl2Weights(tmp_path).read("lm_head.weight"), weight)


def test_the_reference_s_own_tensors_are_read_bit_for_bit(shared: Path, tmp_path: Path) -> None:
    found = 0
    for path in sorted((shared / "vectors" / "exl2").glob("0*.safetensors")):
        vector = load_file(path)
        if "dequantized" in vector and "q_weight" in vector:
            members = ("q_weight", "q_scale", "q_scale_max", "q_groups", "q_invperm")
            others_directory(tmp_path, named("any.linear", {name: vector[name] for name in members}))
            assert torch.equal(Exl2Weights(tmp_path).read("any.linear.weight").T, vector["dequantized"]), (
                path.name
            )
            found += 1
    assert found


def test_what_is_written_is_read_and_stands_beside_the_source_s_other_files(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    kept = ["tokenizer.json", "generation_config.json", "chat_template.jinja", "LICENSE", "tokenizer.model"]
    left = [
        "model.safetensors",
        "pytorch_model.bin",
        "model.safetensors.index.json",
        "README.md",
        ".gitattributes",
    ]
    source.mkdir()
    out.mkdir()
    (source / "runs").mkdir()
    for name in [*kept, *left, "config.json"]:
        (source / name).write_text(f"content of {name}")
    tensors, weight = slow_linear(64)
    writer = Exl2Writer(out, shard_bytes=6000)
    writer.add_plain("model.embed_tokens.weight", torch.rand(50, 8).bfloat16())
    writer.add_linear(Q_PROJ, tensors, bias=torch.arange(48.0))
    writer.add_plain("model.norm.weight", torch.full((96,), 1.5))

    files = writer.close(CONFIG, source)

    weights = Exl2Weights(out)
    assert [path.name for path in files] == [
        "output-00001-of-00002.safetensors",
        "output-00002-of-00002.safetensors",
    ]
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [*kept, "config.json", *(p.name for p in files)]
    )
    assert json.loads((out / "config.json").read_text()) == CONFIG
    assert (out / "tokenizer.json").read_text() == "content of tokenizer.json"
    assert torch.equal(weights.read(f"{Q_PROJ}.weight"), weight[:48])
    assert torch.equal(weights.read(f"{Q_PROJ}.bias"), torch.arange(48.0).half())
    assert weights.dtype("model.embed_tokens.weight") == weights.dtype("model.norm.weight") == torch.float16
    stored = {name: file.get_tensor(name) for path in files for file, name in members(path)}
    assert torch.equal(stored[f"{Q_PROJ}.bias"], torch.cat([torch.arange(48.0), torch.zeros(16)]).half())
    assert weights.tensors(Q_PROJ).keys() == tensors.keys() | {"bias"}


def members(path: Path) -> list[tuple[Any, str]]:
    file: Any = safe_open(path, framework="pt")
    return [(file, name) for name in file.keys()]  # noqa: SIM118


def test_a_value_that_float16_cannot_hold_is_refused_by_name_and_size(tmp_path: Path) -> None:
    writer = Exl2Writer(tmp_path)
    writer.add_plain("fits", torch.tensor([65504.0, -65504.0]))

    with pytest.raises(FormatError, match=r"model\.norm\.weight has values up to 70000, .* float16"):
        writer.add_plain("model.norm.weight", torch.tensor([1.0, -70000.0]))
    writer.abandon()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("suffix", "tensor", "message"),
    [
        ("q_scale", None, r"q_scale is missing"),
        ("q_weight", torch.zeros(14, 64, dtype=torch.int16), r"q_weight is torch\.int16 \(14, 64\)"),
        (
            "q_weight",
            torch.zeros(14, 60, dtype=torch.int32),
            r"q_weight has 60 columns, wanted a multiple of 32",
        ),
        ("q_scale", torch.zeros(3, 7, dtype=torch.int32), r"q_scale has shape \(3, 7\), wanted \(3, 8\)"),
        ("q_scale_max", torch.ones(2).half(), r"q_scale has shape \(3, 8\), wanted \(2, 8\)"),
        (
            "q_groups",
            torch.tensor([8, 0, 4, 8], dtype=torch.int16),
            r"q_groups has shape \(4,\), wanted \(6,\)",
        ),
        ("q_groups", torch.tensor([4, 0, 8, 4, 2, 12], dtype=torch.int16), "no valid EXL2 group"),
        ("q_groups", torch.tensor([8, 0, 7, 8, 2, 12], dtype=torch.int16), "no valid EXL2 group"),
        ("q_groups", torch.tensor([8, 0, 4, 8, 2, 20], dtype=torch.int16), "no valid EXL2 group"),
        ("q_groups", torch.tensor([8, 2, 4, 8, 2, 12], dtype=torch.int16), "does not begin at row 0"),
        (
            "q_groups",
            torch.tensor([8, 0, 4, 6, 2, 13], dtype=torch.int16),
            "group of 24 rows, wanted blocks of 32",
        ),
        ("q_invperm", torch.arange(95, dtype=torch.int32), "cover 96 input channels, q_invperm has 95"),
        ("q_invperm", torch.arange(96, dtype=torch.int32) // 2, "q_invperm is no permutation of its 96 rows"),
        ("bias", torch.zeros(48).half(), r"bias has shape \(48,\), wanted \(64,\)"),
    ],
)
def test_a_linear_that_breaks_the_rules_is_refused_by_name(
    suffix: str, tensor: Tensor | None, message: str
) -> None:
    tensors, _ = slow_linear(64)
    check_linear(Q_PROJ, tensors)
    changed = {name: value for name, value in (tensors | {suffix: tensor}).items() if value is not None}

    with pytest.raises(FormatError, match=message) as caught:
        check_linear(Q_PROJ, changed)
    assert Q_PROJ in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_directory_that_cannot_be_used_is_refused_with_the_file_s_name(tmp_path: Path) -> None:
    tensors, _ = slow_linear(64)
    with pytest.raises(ModelError, match="no \\*\\.safetensors"):
        Exl2Weights(tmp_path)
    others_directory(tmp_path, {f"{Q_PROJ}.q_weight": tensors["q_weight"]})
    with pytest.raises(FormatError, match=rf"{Q_PROJ}\.q_scale is missing"):
        Exl2Weights(tmp_path)
    others_directory(tmp_path, named(Q_PROJ, tensors))
    with pytest.raises(ModelError, match=r"no tensor x\.weight"):
        Exl2Weights(tmp_path).read("x.weight")
    (tmp_path / "more.safetensors").write_bytes((tmp_path / "output.safetensors").read_bytes()[:-10])
    with pytest.raises(FormatError, match=r"more\.safetensors is not a whole safetensors file"):
        Exl2Weights(tmp_path)
    assert not is_exl2(tmp_path)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    others_directory(tmp_path, named(Q_PROJ, slow_linear(64)[0]))
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "output.safetensors").read_bytes())

    with pytest.raises(FormatError, match="which another file"):
        Exl2Weights(tmp_path)


def test_an_unquantized_model_is_not_exl2(tiny_llama: Path) -> None:
    assert not is_exl2(tiny_llama)
