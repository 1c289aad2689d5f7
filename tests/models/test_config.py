"""Which configs are taken, and how the others are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from exlq.errors import ModelError
from exlq.models.config import family_of
from exlq.models.families import FAMILIES
from tests.helpers import edit_config, make_model
from tests.models.conftest import opened

SUPPORTED = (
    "Gemma2ForCausalLM, Gemma3ForCausalLM, GemmaForCausalLM, LlamaForCausalLM, MistralForCausalLM, "
    "MixtralForCausalLM, Phi3ForCausalLM, Qwen2ForCausalLM, Qwen2MoeForCausalLM, Qwen3ForCausalLM, "
    "Qwen3MoeForCausalLM, YiForCausalLM"
)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return make_model("llama", tmp_path, tied=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"architectures": ["DbrxForCausalLM"]},
            f"DbrxForCausalLM is not supported; supported are {SUPPORTED}$",
        ),
        (
            {"architectures": ["Gemma3ForConditionalGeneration"]},
            f"is not supported; supported are {SUPPORTED}$",
        ),
        ({"architectures": None}, f"names the architectures None; wanted one of {SUPPORTED}$"),
        ({"architectures": ["LlamaForCausalLM"] * 2}, "wanted one of"),
        ({"model_type": "mistral"}, "says model_type 'mistral' with LlamaForCausalLM; wanted 'llama'"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"is already quantized \(gptq\); wanted bf16"),
        ({"hidden_size": "wide"}, "config.json has hidden_size = "),
        (
            {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1.0}},
            "cannot build LlamaForCausalLM .*spiral",
        ),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(
    llama: Path, settings: dict[str, Any], message: str
) -> None:
    edit_config(llama, **settings)
    with pytest.raises(ModelError, match=message) as caught:
        opened(llama)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is not JSON"), ("[]", "holds a list; wanted an object")]
)
def test_a_broken_config_is_refused(llama: Path, text: str, message: str) -> None:
    (llama / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ModelError, match=message):
        opened(llama)


def test_a_missing_config_is_refused(llama: Path) -> None:
    (llama / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json in"):
        opened(llama)


def test_code_that_a_config_names_is_never_run(llama: Path) -> None:
    (llama / "evil.py").write_text("raise SystemExit('run')", encoding="utf-8")
    edit_config(llama, auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    assert family_of(llama).name == "llama"
    assert opened(llama).n_blocks == 2


def test_our_own_quantized_directories_are_described_as_well(llama: Path) -> None:
    edit_config(llama, quantization_config={"quant_method": "exl2", "bits": 4.0})
    assert opened(llama).n_blocks == 2


def test_every_architecture_belongs_to_one_family_and_two_to_none_of_exllamav2() -> None:
    names = [name for family in FAMILIES.values() for name in family.architectures]
    assert sorted(names) == SUPPORTED.split(", ")
    unknown = [family.name for family in FAMILIES.values() if family.exl2_architecture is None]
    assert unknown == ["gemma3", "qwen2_moe"]
    assert all(key == family.name for key, family in FAMILIES.items())
