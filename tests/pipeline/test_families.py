"""Every family EXL2 knows, from a tiny model to a directory that predicts as the model does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from exlq.checkpoint.open import open_checkpoint
from exlq.errors import ModelError
from exlq.formats.exl2_directory import Exl2Weights
from exlq.models.families import FAMILIES
from exlq.models.open import open_model
from exlq.pipeline.outputs import make_outputs
from exlq.pipeline.plan import make_plan
from tests.models.conftest import streamed_logits, whole_logits, whole_model
from tests.pipeline.conftest import TinyMaker
from tests.pipeline.helpers import convert, settings, stored_bits

CASES = [
    ("llama", True),
    ("llama", False),
    ("yi", False),
    ("mistral", False),
    ("qwen2", True),
    ("qwen2", False),
    ("qwen3", True),
    ("qwen3", False),
    ("gemma", True),
    ("gemma2", True),
    ("phi3", False),
    ("mixtral", False),
    ("qwen3_moe", False),
]
PLAIN = ("model.embed_tokens.weight", ".gate.weight")  # a router is kept as it is
WANTED_KEYS = {"quant_method", "version", "bits", "head_bits", "calibration"}


def test_no_family_that_exl2_knows_is_left_out() -> None:
    known = {name for name, family in FAMILIES.items() if family.exl2_architecture}
    assert known == {name for name, _ in CASES}


@pytest.mark.parametrize(("family", "tied"), CASES)
def test_at_6_bits_per_weight_it_predicts_as_its_base(
    tiny: TinyMaker, ids_file: Path, tmp_path: Path, family: str, tied: bool
) -> None:
    base = tiny(family, tied)
    config = settings(base, tmp_path / "out", ids_file)
    summary = convert(config)
    written = tmp_path / "out" / "exl2"
    most = 0.03 if family == "qwen3_moe" else 0.01  # a token sent to other experts costs more than rounding
    check_divergence(base, written, make_plan(config).checked_rows()[0], most)
    check_bits(base, written, summary["outputs"]["exl2"]["bpw"])
    check_files(base, written)
    check_settings(written)


def check_divergence(base: Path, written: Path, rows: torch.Tensor, most: float) -> None:
    """KL from the base's own whole forward to what the written tensors give."""
    model = open_model(written, Exl2Weights(written), device=torch.device("cpu"))
    log_p = whole_logits(base, rows).double().log_softmax(-1)
    log_q = streamed_logits(model, rows).double().log_softmax(-1)
    kl = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    assert 0 < kl < most


def check_bits(base: Path, written: Path, bpw: float) -> None:
    """The stored bits, counted in the files, over the weights, counted in transformers' model."""
    bits = stored_bits(written)
    assert bits.pop("lm_head") > 0
    layers = whole_model(base).model.layers.named_parameters()
    numel = sum(parameter.numel() for name, parameter in layers if "proj" in name and parameter.ndim > 1)
    assert sum(bits.values()) / numel == bpw <= 6.0


def check_files(base: Path, written: Path) -> None:
    names = {path.name for path in written.iterdir()}
    assert names == {
        "README.md",
        "config.json",
        "generation_config.json",
        "output.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (written / name).read_bytes() == (base / name).read_bytes()
    stored = load_file(written / "output.safetensors")
    plain = {name for name in stored if name.endswith(".weight")}
    sources = load_file(base / "model.safetensors")
    assert plain == {name for name in sources if "norm" in name or name.endswith(PLAIN)}


def check_settings(written: Path) -> None:
    config = json.loads((written / "config.json").read_text(encoding="utf-8"))
    assert len(config["architectures"]) == 1
    assert isinstance(config["rope_theta"], float)
    assert "torch_dtype" in config
    quantization = config["quantization_config"]
    assert quantization.keys() >= WANTED_KEYS
    assert (quantization["quant_method"], quantization["bits"], quantization["head_bits"]) == ("exl2", 6.0, 6)
    assert quantization["calibration"] == {"rows": 24, "length": 64, "dataset": "ids.parquet"}


def test_a_family_exllamav2_does_not_know_is_refused(tiny: TinyMaker, ids_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"ExLlamaV2 0\.3\.2 does not know Gemma3ForCausalLM"):
        make_outputs(make_plan(settings(tiny("gemma3", True), tmp_path / "out", ids_file)))
    assert not list(tmp_path.iterdir())


def test_a_sharded_source_leaves_no_index_behind(llama: Path, ids_file: Path, tmp_path: Path) -> None:
    source = tmp_path / "sharded"
    whole_model(llama).save_pretrained(source, max_shard_size="60KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).write_bytes((llama / name).read_bytes())
    assert (source / "model.safetensors.index.json").exists()
    assert len(list(source.glob("*.safetensors"))) > 2
    convert(settings(source, tmp_path / "sharded-out", ids_file))
    convert(settings(llama, tmp_path / "whole-out", ids_file))
    one, other = tmp_path / "sharded-out" / "exl2", tmp_path / "whole-out" / "exl2"
    assert not list(one.glob("*.index.json"))
    assert (one / "output.safetensors").read_bytes() == (other / "output.safetensors").read_bytes()
    assert open_checkpoint(source).keys() == open_checkpoint(llama).keys()
