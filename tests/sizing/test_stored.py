"""Sizes said beforehand are those of the files."""

from __future__ import annotations

from pathlib import Path

import pytest

from exlq.errors import ModelError
from exlq.formats.codecs import CODECS
from exlq.formats.exl2 import storage_bits
from exlq.formats.exl2_options import HEAD_OPTIONS, OPTIONS, groups_of
from exlq.formats.gguf_codec import SMALL_BLOCKS, SUPER_BLOCKS, UNBLOCKED
from exlq.pipeline.config import ConvertConfig
from exlq.pipeline.job import rehearse
from exlq.pipeline.outputs import make_outputs
from exlq.pipeline.plan import make_plan
from exlq.sizing.shapes import read_shape
from exlq.sizing.stored import STORED, TRIED, exl2_bits, extreme_bytes, formats_of, recipe_bytes
from exlq.types import LinearSpec
from tests.helpers import make_model
from tests.pipeline.helpers import convert, settings, write_ids
from tests.sizing.helpers import published

# As the pages of these files on Hugging Face give it, in 10^9 bytes: bartowski's
# Meta-Llama-3.1-8B-Instruct-Q4_K_M and Qwen2.5-7B-Instruct-Q4_K_M, QuantFactory's Mistral-7B-v0.3.Q4_K_M.
PUBLISHED_GB = {"Llama-3.1-8B": 4.92, "Qwen2.5-7B": 4.68, "Mistral-7B-v0.3": 4.37}
# Bytes of the bundled model's files by recipe, README.md.
BUNDLED = {"Q4_K_M": 2_682_752, "Q3_K_M": 2_242_176, "Q2_K": 1_824_384}


@pytest.mark.parametrize("name", PUBLISHED_GB)
def test_a_published_file_has_the_size_said(name: str) -> None:
    assert recipe_bytes(published(name), "Q4_K_M") == pytest.approx(1e9 * PUBLISHED_GB[name], rel=0.01)


@pytest.mark.parametrize("recipe", BUNDLED)
def test_the_bundled_models_recipes_have_the_size_said(tiny_llama: Path, recipe: str) -> None:
    assert recipe_bytes(read_shape(tiny_llama), recipe) == pytest.approx(BUNDLED[recipe], rel=0.01)


def bundled_settings(tiny_llama: Path, place: Path) -> ConvertConfig:
    """The bundled model at 4.5 bits per weight, from the committed measurement."""
    committed = Path(__file__).parents[2] / "measurements" / "tiny-llama.json"
    few = {"rows": 8, "length": 64, "measurement_rows": 8, "measurement_length": 64, "shard_mib": 8192}
    given = {"measurement": committed, "force_measurement": True, "formats": None, "measure": None}
    text = write_ids(place / "ids.parquet")
    return settings(tiny_llama, place / "out", text, bits=4.5, **few, **given)


def test_the_bundled_model_at_4_5_bits_has_the_size_said(tiny_llama: Path, tmp_path: Path) -> None:
    config, shape = bundled_settings(tiny_llama, tmp_path), read_shape(tiny_llama)
    exact = rehearse(config)[0]["gguf"]["file_bytes"]
    assert STORED["gguf"].n_bytes(shape, 4.5, 6) == pytest.approx(exact, rel=0.01)
    (exl2, _), _ = make_outputs(make_plan(config))
    assert STORED["exl2"].n_bytes(shape, 4.5, 6) == pytest.approx(exl2.estimated_bytes(), rel=0.01)
    assert STORED["exl2"].n_bytes(shape, 4.5, 6) == pytest.approx(3_273_936, rel=0.01)  # as converted


@pytest.mark.slow
def test_the_bundled_model_converted_has_the_size_said(tiny_llama: Path, tmp_path: Path) -> None:
    summary, shape = convert(bundled_settings(tiny_llama, tmp_path)), read_shape(tiny_llama)
    for name, made in summary["outputs"].items():
        assert STORED[name].n_bytes(shape, 4.5, 6) == pytest.approx(made["bytes"], rel=0.01), name
    assert set(summary["outputs"]) == set(formats_of(shape))


@pytest.mark.parametrize("tied", [False, True])
def test_the_reach_is_that_of_the_conversion(tmp_path: Path, tied: bool) -> None:
    directory = make_model("llama", tmp_path / "m", tied=tied, hidden_size=256, intermediate_size=512)
    ids = write_ids(tmp_path / "ids.parquet")
    plan = make_plan(settings(directory, tmp_path / "out", ids, formats=None, measure=None))
    for output in make_outputs(plan)[0]:
        low, high = STORED[output.name].reach(read_shape(directory))
        assert output.reach == f"{low:.3f} to {high:.3f} bits per weight"


@pytest.mark.parametrize("out_features", [32, 100, 4096])
@pytest.mark.parametrize("in_features", [256, 768, 11008])
def test_exl2_bits_are_those_of_the_format(in_features: int, out_features: int) -> None:
    spec = LinearSpec("model.layers.0.mlp.up_proj", in_features, out_features)
    for option in (*OPTIONS, *HEAD_OPTIONS.values()):
        assert exl2_bits(option.qparams, spec) == storage_bits(
            groups_of(option.qparams, in_features), out_features
        )


@pytest.mark.parametrize("in_features", [256, 96, 40])
def test_the_options_are_those_of_the_codecs(in_features: int) -> None:
    names = {256: SUPER_BLOCKS, 32: SMALL_BLOCKS, 1: UNBLOCKED}
    spec = LinearSpec("model.layers.0.mlp.up_proj", in_features, 64)
    assert STORED["gguf"].tried(spec) == len(CODECS["gguf"].options(spec))
    assert STORED["exl2"].tried(spec) == len(OPTIONS)
    for row in TRIED:
        assert (row.least, row.most, row.n_options) == (
            names[row.block_size][0],
            names[row.block_size][-1],
            len(names[row.block_size]),
        )


@pytest.mark.parametrize("name", ["Llama-3.1-8B", "gemma-2-2b"])
def test_more_bits_are_more_bytes_and_recipes_lie_within_the_extremes(name: str) -> None:
    shape = published(name)
    for stored in STORED.values():
        sizes = [stored.n_bytes(shape, hundredths / 100, 6) for hundredths in range(270, 820)]
        assert sizes == sorted(set(sizes))
    least, most = extreme_bytes(shape)
    assert least <= recipe_bytes(shape, "Q2_K") < recipe_bytes(shape, "Q6_K") < most
    assert most == recipe_bytes(shape, "Q8_0")


def test_a_format_the_family_does_not_have_is_refused(tmp_path: Path) -> None:
    shape = read_shape(make_model("gemma3", tmp_path / "m", tied=True))
    assert formats_of(shape) == ("gguf",)
    with pytest.raises(ModelError, match="ExLlamaV2"):
        STORED["exl2"].reach(shape)
