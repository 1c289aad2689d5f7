"""A model run block by block is the whole model."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from exlq.checkpoint.open import open_checkpoint
from exlq.models.families import FAMILIES
from exlq.models.open import open_model
from tests.helpers import edit_config, make_model
from tests.models.conftest import CASES, CPU, SPARSE, TinyMaker, opened, streamed_logits, whole_logits

ROPE_KINDS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
}


@pytest.mark.parametrize(("family", "tied"), CASES)
def test_streamed_logits_equal_the_whole_models(
    tiny: TinyMaker, family: str, tied: bool, rows: Tensor
) -> None:
    directory = tiny(family, tied)
    model = opened(directory)
    assert model.tied == tied
    assert (streamed_logits(model, rows) - whole_logits(directory, rows)).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3"])
def test_the_window_is_felt_by_what_lies_beyond_it(
    tmp_path: Path, tiny: TinyMaker, family: str, rows: Tensor
) -> None:
    wide = make_model(family, tmp_path, tied=True, sliding_window=512)
    narrow, unbounded = (streamed_logits(opened(d), rows) for d in (tiny(family, True), wide))
    assert (narrow[:, :8] - unbounded[:, :8]).abs().max() < 1e-5
    assert (narrow[:, 8:] - unbounded[:, 8:]).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ROPE_KINDS)
def test_rope_settings_give_the_same_in_both_forms_of_config(tmp_path: Path, kind: str, rows: Tensor) -> None:
    settings = ROPE_KINDS[kind]
    directory = make_model("llama", tmp_path, tied=False, rope_parameters={"rope_theta": 5e4, **settings})
    recent, wanted = streamed_logits(opened(directory), rows), whole_logits(directory, rows)
    edit_config(directory, without=("rope_parameters",), rope_theta=5e4, rope_scaling=_older(settings))
    assert (recent - wanted).abs().max() < 1e-5
    assert (streamed_logits(opened(directory), rows) - wanted).abs().max() < 1e-5


def _older(settings: dict[str, Any]) -> dict[str, Any] | None:
    return None if settings["rope_type"] == "default" else settings


@pytest.mark.parametrize("kind", [kind for kind in ROPE_KINDS if kind != "default"])
def test_rope_kinds_differ_from_the_default(tmp_path: Path, tiny: TinyMaker, kind: str, rows: Tensor) -> None:
    scaled = make_model(
        "llama", tmp_path, tied=False, rope_parameters={"rope_theta": 1e4, **ROPE_KINDS[kind]}
    )
    plain = tiny("llama", False)
    assert (streamed_logits(opened(scaled), rows) - streamed_logits(opened(plain), rows)).abs().max() > 1e-2


@pytest.mark.parametrize("length", [16, 48])
def test_longrope_switches_its_factors_with_the_length(tmp_path: Path, length: int) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [3.0] * 8}
    directory = make_model(
        "phi3", tmp_path, tied=False, rope_parameters=rope, original_max_position_embeddings=32
    )
    rows = torch.arange(2 * length).reshape(2, length)
    assert (streamed_logits(opened(directory), rows) - whole_logits(directory, rows)).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"num_key_value_heads": 4}),
        ("llama", {"num_key_value_heads": 1}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    ],
)
def test_biases_and_head_groups_are_heeded(
    tmp_path: Path, family: str, settings: dict[str, Any], rows: Tensor
) -> None:
    directory = make_model(family, tmp_path, tied=False, **settings)
    assert (streamed_logits(opened(directory), rows) - whole_logits(directory, rows)).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sources_are_computed_in_float32(
    tmp_path: Path, dtype: torch.dtype, rows: Tensor
) -> None:
    directory = make_model("gemma2", tmp_path, tied=True, hidden_size=80)  # √80 has no short mantissa
    path = directory / "model.safetensors"
    save_file({key: value.to(dtype) for key, value in load_file(path).items()}, path)
    model = opened(directory)
    assert model.linear_weight("model.layers.0.self_attn.q_proj").dtype == dtype
    assert (streamed_logits(model, rows) - whole_logits(directory, rows)).abs().max() < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_linears_and_plain_tensors_are_all_there_is(tiny: TinyMaker, family: str) -> None:
    directory = tiny(family, True)
    model, stored = opened(directory), load_file(directory / "model.safetensors")
    linears = [linear for index in range(model.n_blocks) for linear in model.linears(index)]
    numel = sum(model.weights.read(name).numel() for name in model.plain_tensors())
    for linear in linears:
        weight, bias = model.linear_weight(linear.spec.key), model.linear_bias(linear.spec.key)
        assert weight.shape == (linear.spec.out_features, linear.spec.in_features)
        assert (bias is not None) == linear.spec.bias
        numel += weight.numel() + (0 if bias is None else bias.numel())
    assert numel == sum(value.numel() for value in stored.values())
    wanted = [stage.input_key for stage in model.stages(0) for _ in stage.linears]
    assert [linear.stage for linear in model.linears(0)] == wanted
    assert wanted[:4] == ["attn_in"] * 3 + ["attn_out"]
    assert family in SPARSE or wanted[4:] == ["mlp_in"] * 2 + ["mlp_out"]


class Spy:
    """A checkpoint that remembers what is read, and the most rows read of one tensor."""

    def __init__(self, directory: Path) -> None:
        self._inner = open_checkpoint(directory)
        self.read_keys: list[str] = []
        self.most_rows: dict[str, int] = {}

    def keys(self) -> Collection[str]:
        return self._inner.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        return self._inner.shape(key)

    def dtype(self, key: str) -> torch.dtype:
        return self._inner.dtype(key)

    def read(self, key: str, rows: slice | Tensor | None = None) -> Tensor:
        found = self._inner.read(key, rows)
        self.read_keys.append(key)
        self.most_rows[key] = max(self.most_rows.get(key, 0), len(found))
        return found


def test_at_most_one_block_is_in_memory(tiny: TinyMaker, rows: Tensor) -> None:
    spy = Spy(tiny("llama", False))
    model = open_model(tiny("llama", False), spy, device=CPU)
    assert spy.read_keys == ["model.norm.weight"]
    for index in range(model.n_blocks):
        spy.read_keys.clear()
        with model.block(index) as block:
            block.forward(torch.zeros(1, 4, 64))
            real = {name for name, value in model._skeleton.named_parameters() if not value.is_meta}
            prefix = f"model.layers.{index}."
            read = {name for name in spy.read_keys if name.startswith(prefix)}  # the next ones are looked at
            assert {name for name in real if name.startswith(prefix)} == read
            assert {name for name in real if not name.startswith(prefix)} == {"model.norm.weight"}
    assert sum(not value.is_meta for value in model._skeleton.parameters()) == 1


def test_a_second_block_is_not_opened_beside_the_first(tiny: TinyMaker) -> None:
    model = opened(tiny("llama", False))
    with model.block(0), pytest.raises(AssertionError, match="block 0 is still open"), model.block(1):
        pass
    with model.block(1):
        pass


def test_embedding_reads_only_the_rows_that_occur(tiny: TinyMaker) -> None:
    spy = Spy(tiny("gemma", True))
    model = open_model(tiny("gemma", True), spy, device=CPU)
    hidden = model.embed(torch.tensor([[5, 7, 5], [7, 9, 271]]))
    assert spy.most_rows["model.embed_tokens.weight"] == 4
    table = load_file(tiny("gemma", True) / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(hidden[1, 2], table[271] * 64**0.5)


def test_no_buffer_is_left_without_values(tiny: TinyMaker) -> None:
    for family in FAMILIES:
        model = opened(tiny(family, True))
        whole = dict(model._skeleton.named_buffers())
        assert whole
        assert all(not value.is_meta and value.isfinite().all() for value in whole.values())
