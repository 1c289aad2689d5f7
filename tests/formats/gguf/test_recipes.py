"""Types of recipes against what llama-quantize printed for the same shapes (`tests/freeze_recipes.py`)."""

from __future__ import annotations

import json
import random
from pathlib import Path

import gguf
import pytest

from exlq.errors import ConfigError, FormatError, ModelError
from exlq.formats.gguf import recipes
from exlq.formats.gguf.recipes import Shape, recipe_named, recipe_types
from exlq.formats.gguf.values import TensorInfo
from exlq.formats.gguf_blocks import TYPES
from tests.formats.gguf.recipe_models import MODELS, NAMES, Model, packed

FROZEN = json.loads((Path(__file__).parents[2] / "assets" / "gguf-recipes.json").read_text(encoding="utf-8"))

# Bits per weight of Llama-3.1-8B as tools/quantize/README.md of llama.cpp prints them.
PUBLISHED_BPW = {
    "Q2_K_S": 2.97,
    "Q2_K": 3.16,
    "Q3_K_S": 3.64,
    "Q3_K_M": 4.00,
    "Q3_K_L": 4.30,
    "IQ4_XS": 4.46,
    "Q4_K_S": 4.67,
    "Q4_K_M": 4.89,
    "Q5_K_S": 5.57,
    "Q5_K_M": 5.70,
    "Q6_K": 6.56,
    "Q8_0": 8.50,
    "F16": 16.00,
}


def ours(model: Model, name: str, imatrix: bool) -> dict[str, str]:
    return recipe_types(recipe_named(name), model.tensors(), model.shape, imatrix=imatrix)


def bits_per_weight(types: dict[str, str], model: Model) -> float:
    shapes = {tensor.name: tensor.shape for tensor in model.tensors()}
    stored = sum(recipes.tensor_bytes(types[name], shape) for name, shape in shapes.items())
    return 8 * stored / sum(recipes.tensor_bytes("F32", shape) // 4 for shape in shapes.values())


@pytest.mark.parametrize("imatrix", [False, True], ids=["plain", "imatrix"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("model", MODELS)
def test_every_tensor_gets_the_type_llama_quantize_gives_it(model: str, name: str, imatrix: bool) -> None:
    answers = FROZEN[model]
    expected = answers.get(f"{name} imatrix", answers[name]) if imatrix else answers[name]

    types = ours(MODELS[model], name, imatrix)

    assert packed(types, MODELS[model]) == {key: value for key, value in expected.items() if key != "bpw"}
    assert bits_per_weight(types, MODELS[model]) == pytest.approx(expected["bpw"], abs=0.00501)


@pytest.mark.parametrize("name", PUBLISHED_BPW)
def test_llama_3_8b_has_the_published_bits_per_weight(name: str) -> None:
    types = ours(MODELS["Llama-3-8B"], name, imatrix=False)
    assert bits_per_weight(types, MODELS["Llama-3-8B"]) == pytest.approx(PUBLISHED_BPW[name], abs=0.0051)


def test_the_order_of_the_tensors_does_not_matter() -> None:
    model = MODELS["Llama-3-8B"]
    shuffled = model.tensors()
    random.Random(0).shuffle(shuffled)
    types = recipe_types(recipe_named("Q3_K_M"), shuffled, model.shape, imatrix=False)
    assert types == ours(model, "Q3_K_M", imatrix=False)


def test_names_numbers_and_aliases_are_those_of_llama_cpp() -> None:
    for name in NAMES:
        file_type = next(t for t in gguf.LlamaFileType if t.name.split("_", 1)[1] == name)
        assert recipe_named(name).file_type == file_type
        assert recipe_named(name.lower()) is recipe_named(str(int(file_type))) is recipe_named(f" {name} ")
    for letter in "345":
        assert recipe_named(f"q{letter}_k") is recipe_named(f"Q{letter}_K_M")


@pytest.mark.parametrize("text", ["IQ2_XS", "4", "", "-1", "Q4_K_L", "15.0", "²"])
def test_what_is_no_recipe_is_refused_with_the_list_of_names(text: str) -> None:
    with pytest.raises(ConfigError, match=r"Q4_K_M, .*Q3_K"):
        recipe_named(text)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("blk.0.attn_norm.weight", (64, 64)),
        ("blk.0.attn_q.bias", (64, 64)),
        ("blk.0.ffn_gate_inp.weight", (8, 256)),
        ("blk.0.ffn_gate_inp_shexp.weight", (1, 256)),
        ("rope_freqs.weight", (64,)),
        ("position_embd.weight", (64, 64)),
        ("blk.0.ssm_conv1d.weight", (64, 64)),
    ],
)
def test_vectors_norms_and_routers_stay_f32(name: str, shape: tuple[int, ...]) -> None:
    tensors = [TensorInfo(name, shape, "F32"), TensorInfo("output.weight", (64, 256), "F16")]
    types = recipe_types(recipe_named("Q4_0"), tensors, Shape("llama", 1, 4, 4), imatrix=False)
    assert types == {name: "F32", "output.weight": "Q6_K"}


def test_an_expert_model_whose_blocks_cannot_be_told_is_refused() -> None:
    tensors = [TensorInfo("mlp.ffn_down_exps.weight", (4, 256, 256), "F16")]
    with pytest.raises(ModelError, match="in none of the 2 blocks"):
        recipe_types(recipe_named("Q2_K"), tensors, Shape("llama", 2, 4, 4, 4), imatrix=False)


@pytest.mark.parametrize("type", TYPES)
def test_bytes_of_rows_are_those_of_the_gguf_package(type: str) -> None:
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type]]
    assert recipes.row_bytes(type, 5 * block) == 5 * size
    assert recipes.tensor_bytes(type, (3, 7, 2 * block)) == 42 * size
    if block > 1:
        with pytest.raises(FormatError, match=f"found rows of {block + 1}"):
            recipes.row_bytes(type, block + 1)


def test_a_mix_is_called_after_the_type_that_holds_most_bytes() -> None:
    assert recipes.nearest_file_type({"Q6_K": 10, "Q4_K": 90, "F32": 1}) == gguf.LlamaFileType.MOSTLY_Q4_K_M
    assert recipes.nearest_file_type({"F32": 10}) == gguf.LlamaFileType.ALL_F32
    for type in TYPES:
        assert type in recipes.nearest_file_type({type: 1}).name
