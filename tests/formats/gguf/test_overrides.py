"""Expected types are what `llama-quantize --dry-run` printed for the same options."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from exlq.errors import ConfigError
from exlq.formats.gguf.overrides import (
    Overrides,
    parse_overrides,
    pinned,
    pinned_types,
    read_type_file,
    type_file,
)
from exlq.formats.gguf.recipes import recipe_named, recipe_types
from exlq.formats.gguf.values import TensorInfo
from exlq.formats.gguf_blocks import TYPES
from tests.formats.gguf.recipe_models import MODELS, packed


def types(model: str, recipe: str, overrides: Overrides) -> dict[str, str]:
    tensors, named = MODELS[model].tensors(), recipe_named(recipe)
    pins = pinned_types(overrides, tensors, named)
    return recipe_types(named, tensors, MODELS[model].shape, imatrix=False, pinned=pins)


@pytest.mark.parametrize(
    ("recipe", "items", "output", "embedding", "expected"),
    [
        ("Q4_K_M", [], None, None, "Q6_K"),
        ("Q4_K_M", [], "q5_k", None, "Q5_K"),
        ("Q4_K_M", [], None, "q8_0", "Q8_0"),
        ("Q4_K_M", [], "q5_0", "q8_0", "Q8_0"),
        ("Q4_K_M", ["token_embd=q5_0"], "q8_0", None, "Q5_0"),
        ("Q4_K_M", ["token_embd=q5_0"], "q8_0", "q5_1", "Q5_1"),
        ("F16", ["token_embd=q5_0"], None, None, "F16"),
        ("F16", [], "q8_0", None, "F16"),
        ("F16", [], None, "q8_0", "Q8_0"),
    ],
)
def test_tied_embeddings_take_their_flag_then_a_pattern_then_the_heads_flag(
    recipe: str, items: list[str], output: str | None, embedding: str | None, expected: str
) -> None:
    found = types("Llama-3.2-1B", recipe, parse_overrides(items, output, embedding))
    assert found["token_embd.weight"] == expected


@pytest.mark.parametrize(
    ("recipe", "items", "output", "expected"),
    [
        ("Q4_K_M", ["output=q3_K"], None, "Q3_K"),
        ("Q4_K_M", ["output=q3_K"], "q8_0", "Q8_0"),
        ("F16", ["output=q3_K"], None, "F16"),
        ("F16", [], "q8_0", "Q8_0"),
    ],
)
def test_a_head_of_its_own_takes_its_flag_then_a_pattern(
    recipe: str, items: list[str], output: str | None, expected: str
) -> None:
    found = types("Llama-3-8B", recipe, parse_overrides(items, output))
    assert found["output.weight"] == expected
    assert found["token_embd.weight"] == recipe_named(recipe).base


def test_patterns_are_lower_cased_and_found_anywhere_in_the_name_the_first_one_counts() -> None:
    overrides = parse_overrides([r"BLK\.[0-1]\.ATTN_V=q8_0", "attn_v=q5_1", "output=q3_K"])
    found = types("Llama-3-8B", "Q4_0", overrides)
    assert [found[f"blk.{block}.attn_v.weight"] for block in range(3)] == ["Q8_0", "Q8_0", "Q5_1"]
    assert found["blk.5.attn_output.weight"] == "Q3_K"
    assert found["output_norm.weight"] == "F32"


def test_a_pinned_tensor_is_not_counted_among_those_a_recipe_alternates() -> None:
    overrides = parse_overrides([r"blk\.1\.ffn_down=q8_0", r"blk\.0\.attn_v=q2_k"])
    found = packed(types("Llama-3-8B", "Q3_K_M", overrides), MODELS["Llama-3-8B"])
    assert (found["attn_v"], found["ffn_down"]) == ("2 5*2 4*29", "5 8 5 4*29")


def test_a_pattern_gives_way_to_the_length_of_rows() -> None:
    found = types("Qwen2.5-0.5B", "Q8_0", parse_overrides(["attn_q=q6_k", "token_embd=iq4_xs"], "q3_K"))
    assert found["blk.0.attn_q.weight"] == "Q8_0"
    assert found["token_embd.weight"] == "IQ4_NL"  # rows of 896


def test_a_flag_that_rows_do_not_allow_is_refused() -> None:
    tensors = MODELS["Qwen2.5-0.5B"].tensors()
    with pytest.raises(ConfigError, match=r"--token-embedding-type Q6_K .* rows of 896; choose Q8_0"):
        pinned_types(parse_overrides(embedding="q6_k"), tensors)
    untied = [*tensors, TensorInfo("output.weight", (64, 896), "F16")]
    with pytest.raises(ConfigError, match=r"--output-tensor-type Q4_K .* rows of 896; choose Q5_0"):
        pinned_types(parse_overrides(output="Q4_K"), untied)


def test_what_is_never_quantized_has_no_type_given_by_hand() -> None:
    everything = parse_overrides([".=q8_0"], "q8_0", "q8_0")
    assert pinned(everything, "blk.0.attn_norm.weight", tied=False) is None
    assert pinned(everything, "blk.0.attn_q.bias", tied=False) is None
    assert pinned(everything, "blk.0.attn_q.weight", tied=False) == "Q8_0"
    assert "v.weight" not in pinned_types(everything, [TensorInfo("v.weight", (64,), "F32")])


def test_a_table_of_embeddings_per_layer_follows_its_flag_unless_a_pattern_names_it() -> None:
    name = "per_layer_token_embd.weight"
    assert pinned(parse_overrides(embedding="q8_0"), name, tied=True) == "Q8_0"
    assert pinned(parse_overrides(["per_layer=q4_0"], embedding="q8_0"), name, tied=True) == "Q4_0"


@pytest.mark.parametrize(
    "item", ["attn_v", "=q8_0", "attn_v=", "attn_v=Q4_K_M", "a(=q8_0", "[[a]=q8_0", "a{2,1}=q8_0"]
)
def test_a_broken_item_is_refused_and_named(item: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(item.partition("=")[0] or item)):
        parse_overrides([item])


@pytest.mark.parametrize("flags", [{"output": "q9"}, {"embedding": ""}])
def test_an_unknown_type_is_refused_with_the_list_of_types(flags: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"-type: '.*' is no tensor type; want one of F32, .*IQ4_XS"):
        parse_overrides(**flags)


def test_items_of_a_file_are_set_apart_by_white_space(tmp_path: Path) -> None:
    path = tmp_path / "types.txt"
    path.write_text(" a=q8_0\tb=q4_0\n\nc=f16\n", encoding="utf-8")
    assert read_type_file(path) == ["a=q8_0", "b=q4_0", "c=f16"]
    for broken in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read"):
            read_type_file(broken)


@pytest.mark.parametrize("model", ["Llama-3.2-1B", "Llama-3-8B", "Mixtral-8x7B"])
def test_a_type_file_gives_every_tensor_its_type_again(model: str, tmp_path: Path) -> None:
    draw = random.Random(0)
    plain = types(model, "Q4_K_M", Overrides())
    mix = {name: type if type == "F32" else draw.choice(list(TYPES)) for name, type in plain.items()}
    (tmp_path / "types.txt").write_text(type_file(mix), encoding="utf-8")

    items = read_type_file(tmp_path / "types.txt")

    assert types(model, "Q4_K_M", parse_overrides(items)) == mix
    for item in items:
        pattern = item.rpartition("=")[0]
        assert sum(bool(re.search(pattern.lower(), name)) for name in mix) == 1, item


def test_a_type_file_can_name_what_a_pattern_cannot_hold() -> None:
    odd = "blk.0.Attn q=ü+.weight"
    [item] = type_file({odd: "Q8_0", "x_norm.weight": "F32"}).split()
    assert item.count("=") == 1
    pattern, _, type = item.partition("=")
    assert re.search(pattern.lower().encode(), odd.encode())
    assert type == "q8_0"
