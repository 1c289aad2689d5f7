"""Names, order and rows of the file's tensors, against the gguf package and slow loops."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import gguf
import pytest
import torch
from torch import Tensor

from exlq.errors import FormatError, ModelError
from exlq.formats.gguf.tensors import (
    Entry,
    file_rows,
    file_tensors,
    find_name,
    from_file,
    name_map,
    shifted,
    to_file,
    unshifted,
)
from exlq.models.families import FAMILIES
from exlq.types import GgufFamily
from tests.conftest import TinyMaker
from tests.formats.gguf.exported import entries_of, family_of, opened, raw_config, ties_of

CONFIG = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}
CONFIG |= {"max_position_embeddings": 64}
LLAMA = GgufFamily("llama", rotates_pairs=True)


@dataclass(frozen=True)
class Shapes:
    """`Weights` of nothing but shapes."""

    shapes: Mapping[str, tuple[int, ...]]

    def keys(self) -> Collection[str]:
        return self.shapes.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        return self.shapes[key]

    def dtype(self, key: str) -> torch.dtype:
        raise AssertionError(key)

    def read(self, key: str, rows: slice | Tensor | None = None) -> Tensor:
        raise AssertionError(key)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_file_has_every_tensor_of_the_model_once(family: str, tiny: TinyMaker) -> None:
    directory = tiny(family, True)
    model = opened(directory)
    entries = entries_of(model, raw_config(directory))
    sources = [source for entry in entries for source in entry.sources]
    assert sorted(sources) == sorted(set(model.weights.keys()) - {"lm_head.weight"})
    for entry in entries:
        rows = torch.cat([model.weights.read(source) for source in entry.sources])
        assert torch.Size(entry.shape).numel() == rows.numel()
        assert entry.rows_shape == tuple(rows.shape)
        assert entry.rows == tuple(model.weights.shape(source)[0] for source in entry.sources)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gguf_package_knows_each_name_for_the_architecture(family: str, tiny: TinyMaker) -> None:
    directory = tiny(family, True)
    model = opened(directory)
    by_name = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    architecture = by_name[family_of(model).architecture]
    known = {gguf.TENSOR_NAMES[kind] for kind in gguf.MODEL_TENSORS[architecture]}
    for entry in entries_of(model, raw_config(directory)):
        stem, kind = entry.name.rsplit(".", 1)
        assert stem in {name.format(bid=block) for name in known for block in range(model.n_blocks)}
        assert kind in ("weight", "bias")


def test_order_is_that_of_a_true_sequential_quantizer(tiny: TinyMaker) -> None:
    directory = tiny("gemma3", False)
    names = [entry.name for entry in entries_of(opened(directory), raw_config(directory))]
    norms = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm", "attn_q_norm", "attn_k_norm")
    matrices = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    assert names[:2] == ["token_embd.weight", "output_norm.weight"]
    for block in range(2):
        found = names[2 + 13 * block :][:13]
        assert set(found[:6]) == {f"blk.{block}.{norm}.weight" for norm in norms}
        assert found[6:] == [f"blk.{block}.{matrix}.weight" for matrix in matrices]
    assert names[28:] == ["output.weight"]


def test_biases_come_with_the_norms_and_are_no_matrices(tiny: TinyMaker) -> None:
    directory = tiny("qwen2", True)
    entries = entries_of(opened(directory), raw_config(directory))
    block = [entry for entry in entries if entry.name.startswith("blk.1.")]
    assert [entry.matrix for entry in block] == [False] * 5 + [True] * 7
    assert sum(entry.name.endswith(".bias") for entry in block[:5]) == 3
    assert entries[0].matrix
    assert not entries[1].matrix


def test_the_tenth_block_comes_after_the_second() -> None:
    shapes = {f"model.layers.{i}.mlp.up_proj.weight": (8, 8) for i in (10, 2, 1)}
    entries = file_tensors(Shapes(shapes), {**CONFIG, "num_hidden_layers": 11}, LLAMA, {}, False)
    assert [entry.name for entry in entries] == [f"blk.{i}.ffn_up.weight" for i in (1, 2, 10)]


def test_fused_linears_are_one_tensor_in_the_checkpoint_s_order(tiny: TinyMaker) -> None:
    directory = tiny("phi3", False)
    model = opened(directory)
    entries = {entry.name: entry for entry in entries_of(model, raw_config(directory))}
    attention = "model.layers.1.self_attn"
    assert entries["blk.1.attn_qkv.weight"].sources == tuple(f"{attention}.{p}_proj.weight" for p in "qkv")
    assert entries["blk.1.ffn_up.weight"].sources == tuple(
        f"model.layers.1.mlp.{p}_proj.weight" for p in ("gate", "up")
    )
    assert entries["blk.1.attn_qkv.weight"].shape == (128, 64)
    # the order of ties decides, not that of the weights
    config, family = raw_config(directory), family_of(model)
    weights = Shapes({key: model.weights.shape(key) for key in reversed(list(model.weights.keys()))})
    again = {entry.name: entry for entry in file_tensors(weights, config, family, ties_of(model), False)}
    assert again["blk.1.attn_qkv.weight"].sources == entries["blk.1.attn_qkv.weight"].sources


def test_q_and_k_have_the_channels_of_a_pair_side_by_side() -> None:
    attention = "model.layers.0.self_attn"
    shapes: dict[str, tuple[int, ...]] = {
        f"{attention}.q_proj.weight": (32, 8),
        f"{attention}.q_proj.bias": (32,),
        f"{attention}.k_proj.weight": (16, 8),
        f"{attention}.v_proj.weight": (16, 8),
    }
    entries = {entry.name: entry for entry in file_tensors(Shapes(shapes), CONFIG, LLAMA, {}, False)}
    for name, heads in {"attn_q.weight": 4, "attn_q.bias": 4, "attn_k.weight": 2}.items():
        expected = []
        for head in range(heads):
            for pair in range(4):
                expected += [head * 8 + pair, head * 8 + pair + 4]
        order = entries[f"blk.0.{name}"].order
        assert order is not None
        assert order.tolist() == expected
    assert entries["blk.0.attn_v.weight"].order is None
    plain = file_tensors(Shapes(shapes), CONFIG, GgufFamily("qwen2"), {}, False)
    assert all(entry.order is None for entry in plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_from_file_undoes_to_file(dtype: torch.dtype) -> None:
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    entry = Entry("a", ("q", "k", "v"), (6, 2, 4), (12, 5), order)
    values = torch.randint(0, 99, (12, 5)).to(dtype)
    stored = to_file(entry, values)
    assert torch.equal(stored, values[order])
    found = from_file(entry, stored)
    assert list(found) == ["q", "k", "v"]
    assert torch.equal(torch.cat(list(found.values())), values)
    for source, part in found.items():
        assert torch.equal(stored[file_rows(entry, source)], part)
    with pytest.raises(FormatError, match="a has 11 rows, 12 were wanted"):
        from_file(entry, stored[1:])


def test_shifts_are_added_to_norms_alone_and_undone(tiny: TinyMaker) -> None:
    directory = tiny("gemma3", True)
    for entry in entries_of(opened(directory), raw_config(directory)):
        assert entry.shift == (1.0 if "norm" in entry.name else 0.0)
        values = torch.tensor([0.5, -0.25])
        assert torch.equal(shifted(entry, values), values + entry.shift)
        assert torch.equal(unshifted(entry, shifted(entry, values)), values)


def test_computed_tensors_carry_their_values() -> None:
    scaling = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
    entries = file_tensors(Shapes({}), {**CONFIG, "rope_scaling": scaling}, LLAMA, {}, False)
    (entry,) = entries
    assert (entry.name, entry.sources, entry.shape) == ("rope_freqs.weight", (), (4,))
    assert entry.value is not None
    assert entry.value.dtype == torch.float32
    assert not entry.matrix


@pytest.mark.parametrize(
    ("name", "family", "message"),
    [
        ("model.layers.0.self_attn.sinks", LLAMA, r"no name for model\.layers\.0\.self_attn\.sinks"),
        (
            "model.layers.0.self_attn.o_proj.bias",
            GgufFamily("qwen3"),
            r"qwen3 .* has no blk\.0\.attn_output\.bias",
        ),
        ("model.norm.weight", GgufFamily("none"), "knows no architecture 'none'"),
    ],
)
def test_what_llama_cpp_has_not_is_refused(name: str, family: GgufFamily, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        file_tensors(Shapes({name: (32,)}), CONFIG, family, {}, False)


def test_a_name_longer_than_llama_cpp_takes_is_refused() -> None:
    names = name_map(LLAMA, 1)
    names.mapping["model.long"] = (None, "blk." + "1" * 60)
    with pytest.raises(ModelError, match="has 71 characters"):
        find_name(names, "model.long.weight", "llama")
