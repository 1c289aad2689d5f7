"""Conversions of models with experts: what is stored under which names, and experts that few tokens reach."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from exlq.errors import ModelError
from exlq.evaluation import llamacpp
from exlq.evaluation.dequantized import dequantized_copy
from exlq.formats.gguf.imatrix import load
from exlq.inspect.measured import inspect_measurement
from exlq.pipeline import measured
from exlq.pipeline.imatrix import ImatrixConfig, collect
from exlq.pipeline.outputs import make_outputs
from exlq.pipeline.plan import make_plan
from exlq.pipeline.progress import silent
from exlq.pipeline.remarks import Remarks
from tests.helpers import make_model
from tests.models.conftest import streamed_logits, whole_logits
from tests.models.test_moe import fuse
from tests.pipeline.helpers import SUFFIXES, Events, Stored, contents, convert, edit_tensors, settings
from tests.pipeline.test_gguf_families import check_in_llama_cpp

STARVING, COUNT = 4, 5
# The names that ExLlamaV2 0.3.2 looks for, from its architecture.py, * for a number.
READ_BY_EXLLAMAV2 = {
    "mixtral": ("block_sparse_moe.gate", "block_sparse_moe.experts.*.w1", "w2", "w3"),
    "qwen3_moe": ("mlp.gate", "mlp.experts.*.gate_proj", "up_proj", "down_proj"),
}


def starve(directory: Path) -> Path:
    """No token goes to the last of five experts: of a, -a and b, -b one is always above it, at 0."""
    generator = torch.Generator().manual_seed(5)
    stored = load_file(directory / "model.safetensors")
    routers = {}
    for name in (name for name in stored if name.endswith(".gate.weight")):
        a, b = torch.randn(2, stored[name].shape[1], generator=generator)
        routers[name.replace(".", "__")] = torch.stack([a, -a, b, -b, torch.zeros_like(a)])
    edit_tensors(directory / "model.safetensors", **routers)
    return directory


@dataclass(frozen=True)
class Made:
    base: Path
    out: Path
    summary: dict[str, Any]


@pytest.fixture(scope="module")
def starved(ids_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A Mixtral in both formats, one of whose five experts no token reaches."""
    place = tmp_path_factory.mktemp("starved")
    base = starve(make_model("mixtral", place / "base", tied=False, num_local_experts=COUNT))
    config = settings(base, place / "out", ids_file, bits=5.0, formats=("exl2", "gguf"), measure=None)
    return Made(base, place / "out", convert(config))


@pytest.mark.parametrize("format", ["exl2", "gguf"])
def test_experts_that_few_tokens_reach_are_named_in_one_line(starved: Made, format: str) -> None:
    (line,) = (line for line in starved.summary["outputs"][format]["notes"] if "experts get fewer" in line)
    for block in range(2):
        assert f"model.layers.{block}.block_sparse_moe.experts.{STARVING} (0)" in line
    assert "\n" not in line


def test_the_measurement_says_how_many_tokens_each_expert_gets(starved: Made) -> None:
    record = json.loads((starved.out / "measurement.json").read_text(encoding="utf-8"))
    for block in range(2):
        counts = record["experts"][f"model.layers.{block}"]
        assert len(counts) == COUNT
        assert counts[STARVING] == 0
        assert sum(counts) == 2 * 21 * 64  # two experts a token, of the rows that are not held out
    told = inspect_measurement(starved.out / "measurement.json").facts["experts"]
    assert f"model.layers.0, {STARVING} (0)" in told


def test_an_expert_without_tokens_is_rounded_as_well_as_another(starved: Made) -> None:
    """By what its block's tokens would do to it, and with a loss above nothing."""
    record = json.loads((starved.out / "measurement.json").read_text(encoding="utf-8"))
    losses = {linear["key"]: linear["options"][0]["loss"] for linear in record["measurement"]}
    source, written = load_file(starved.base / "model.safetensors"), Stored.read(starved.out / "gguf")
    for key, name in (("w1", "gate"), ("w2", "down")):
        weights = [source[f"model.layers.0.block_sparse_moe.experts.{e}.{key}.weight"] for e in range(COUNT)]
        found = written.values(f"blk.0.ffn_{name}_exps.weight")
        assert found.shape == (COUNT, *weights[0].shape)
        errors = [float((a - b).norm() / a.norm()) for a, b in zip(weights, found, strict=True)]
        assert errors[STARVING] < 1.3 * max(errors[:STARVING])
        assert losses[f"model.layers.0.block_sparse_moe.experts.{STARVING}.{key}"] > 0


def test_all_experts_of_a_projection_have_one_type_and_routers_none(starved: Made) -> None:
    written = Stored.read(starved.out / "gguf")
    for block in range(2):
        assert written.types[f"blk.{block}.ffn_gate_inp.weight"] == "F32"
        for name in ("gate", "up", "down"):
            tensor = written.tensors[f"blk.{block}.ffn_{name}_exps.weight"]
            assert tensor.shape[2] == COUNT
            assert not re.search(rf"blk\.{block}\.ffn_{name}\.", " ".join(written.types))
    assert written.fields["llama.expert_count"] == COUNT
    assert written.fields["llama.expert_used_count"] == 2
    record = json.loads((starved.out / "measurement.json").read_text(encoding="utf-8"))
    ties = {linear["key"]: linear.get("tie") for linear in record["measurement"]}
    assert len({ties[f"model.layers.1.block_sparse_moe.experts.{e}.w3"] for e in range(COUNT)} - {None}) == 1


@pytest.mark.parametrize("family", READ_BY_EXLLAMAV2)
def test_exl2_holds_each_expert_under_the_names_that_exllamav2_reads(
    family: str, tmp_path: Path, ids_file: Path
) -> None:
    base = make_model(family, tmp_path / "base", tied=False)
    made = convert(settings(base, tmp_path / "out", ids_file, bits=4.5))["outputs"]["exl2"]
    stored = load_file(tmp_path / "out" / "exl2" / "output.safetensors")
    router, first, *others = READ_BY_EXLLAMAV2[family]
    names = [first, *(f"{first.rpartition('.')[0]}.{other}" for other in others)]
    wanted = {f"model.layers.{i}.{router}.weight" for i in range(2)}
    for name in names:
        keys = [f"model.layers.{i}.{name.replace('*', str(e))}" for i in range(2) for e in range(4)]
        wanted |= {f"{key}.{suffix}" for key in keys for suffix in SUFFIXES}
    mlp = {name for name in stored if ".mlp." in name or "sparse" in name}
    assert mlp == wanted
    assert len({made["allocation"][key] for key in made["allocation"] if ".experts." in key}) > 1
    config = json.loads((tmp_path / "out" / "exl2" / "config.json").read_text(encoding="utf-8"))
    assert config["num_local_experts"] == 4
    assert config["num_experts_per_tok"] == 2
    assert config["intermediate_size"] > 0


def test_a_checkpoint_with_all_experts_in_two_tensors_gives_the_same_bytes(
    tmp_path: Path, ids_file: Path
) -> None:
    found = []
    for form in ("apart", "together"):
        base = make_model("mixtral", tmp_path / form / "tiny", tied=False, num_hidden_layers=1)
        if form == "together":
            fuse(base, "mixtral")
        out = tmp_path / form / "out"
        convert(settings(base, out, ids_file, formats=("exl2", "gguf"), measure=None))
        names = ("output.safetensors", ".gguf")
        found.append({n: data for n, data in contents(out).items() if n.endswith(names) and "work" not in n})
        (record,) = (json.loads(v) for n, v in contents(out).items() if n == "measurement.json")
        found[-1]["measurement"] = json.dumps([record["measurement"], record["experts"]]).encode()
    apart, together = found
    assert len(apart) == 3
    assert apart["exl2/output.safetensors"] == together["exl2/output.safetensors"]
    assert apart["measurement"] == together["measurement"]
    one, other = (Stored.read(tmp_path / form / "out" / "gguf") for form in ("apart", "together"))
    assert one.types == other.types
    for name, tensor in one.tensors.items():
        assert (tensor.data == other.tensors[name].data).all(), name


@pytest.mark.slow
def test_a_measurement_that_was_stopped_between_blocks_ends_the_same(tmp_path: Path, ids_file: Path) -> None:
    base = make_model("qwen3_moe", tmp_path / "base", tied=False)
    config = settings(base, tmp_path / "whole", ids_file)
    convert(config)
    stopped = settings(base, tmp_path / "stopped", ids_file)
    with pytest.raises(KeyboardInterrupt):
        convert(stopped, Events(("measuring", 1)))
    with pytest.raises(KeyboardInterrupt):
        convert(stopped, Events(("quantizing exl2", 1)))
    summary = convert(stopped)
    one, other = (contents(tmp_path / name) for name in ("whole", "stopped"))
    assert one["exl2/output.safetensors"] == other["exl2/output.safetensors"]
    records = [json.loads(each["measurement.json"]) for each in (one, other)]
    assert records[0]["experts"] == records[1]["experts"]
    assert records[0]["measurement"] == records[1]["measurement"]
    notes = json.loads(one["summary.json"])["outputs"]["exl2"]["notes"]
    assert list(notes) == list(summary["outputs"]["exl2"]["notes"])


K_QUANTS = {"hidden_size": 256, "intermediate_size": 256, "num_local_experts": 8}


@pytest.mark.skipif(not llamacpp.available(), reason="llama.cpp is not installed (package xllamacpp)")
def test_a_recipe_gives_a_model_of_eight_experts_its_own_types_and_llama_cpp_runs_it(
    tmp_path: Path, ids_file: Path
) -> None:
    base = make_model("mixtral", tmp_path / "base", tied=False, **K_QUANTS)
    config = settings(
        base, tmp_path / "out", ids_file, bits=None, gguf_type="Q4_K_M", formats=("gguf",), measure=None
    )
    convert(config)
    written = Stored.read(tmp_path / "out" / "gguf")
    for block in range(2):
        assert written.types[f"blk.{block}.attn_k.weight"] == "Q8_0"
        assert written.types[f"blk.{block}.attn_v.weight"] == "Q8_0"
        assert written.types[f"blk.{block}.ffn_gate_exps.weight"] == "Q4_K"
    assert [written.types[f"blk.{block}.ffn_down_exps.weight"] for block in range(2)] == ["Q4_K", "Q6_K"]
    (output,) = make_outputs(plan := make_plan(config))[0]
    rows = plan.checked_rows()[0]
    in_torch = streamed_logits(output.opened(tmp_path / "out" / "gguf"), rows)
    (path,) = (tmp_path / "out" / "gguf").glob("*.gguf")
    with llamacpp.Runtime(dequantized_copy(path, tmp_path / "f32.gguf"), context=rows.shape[1]) as runtime:
        found = torch.stack([runtime.logits(row) for row in rows])
    assert float((in_torch - found).abs().max()) < 1e-3 * float(in_torch.std())


@pytest.mark.parametrize(
    ("family", "changes", "format", "said"),
    [
        ("qwen3_moe", {"norm_topk_prob": False}, "gguf", "qwen3moe in llama.cpp adds up the weights"),
        ("qwen3_moe", {"norm_topk_prob": False}, "exl2", "norm_topk_prob = false, ExLlamaV2 0.3.2 always"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "gguf", "has experts in every block"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "exl2", "has experts in some blocks alone"),
        ("qwen2_moe", {"norm_topk_prob": True}, "gguf", "qwen2moe in llama.cpp does not add up the weights"),
        ("qwen2_moe", {}, "exl2", "ExLlamaV2 0.3.2 does not know Qwen2MoeForCausalLM"),
    ],
)
def test_what_the_runtimes_would_compute_otherwise_is_refused(
    family: str, changes: dict[str, Any], format: str, said: str, tmp_path: Path, ids_file: Path
) -> None:
    base = make_model(family, tmp_path / "base", tied=False, **changes)
    with pytest.raises(ModelError, match=re.escape(said)) as caught:
        make_outputs(
            make_plan(settings(base, tmp_path / "out", ids_file, formats=(format,), measure=(format,)))
        )
    assert "\n" not in str(caught.value)


def test_blocks_with_an_mlp_between_those_with_experts_are_measured(tmp_path: Path, ids_file: Path) -> None:
    changes: dict[str, Any] = {"num_hidden_layers": 2, "mlp_only_layers": [0]}
    base = make_model("qwen3_moe", tmp_path / "base", tied=False, **changes)
    plan = make_plan(settings(base, tmp_path / "out", ids_file))
    (tmp_path / "work").mkdir()
    record = measured.measured(plan, tmp_path / "work", {}, silent)
    assert {linear.key for linear in record.linears} == set(plan.specs)
    assert list(record.extra["experts"]) == ["model.layers.1"]
    assert any(linear.key == "model.layers.0.mlp.down_proj" for linear in record.linears)


def test_an_importance_matrix_has_a_row_and_a_count_for_every_expert(
    starved: Made, ids_file: Path, tmp_path: Path
) -> None:
    config = ImatrixConfig(starved.base, tmp_path / "i.gguf", calibration=ids_file, rows=8, length=32)
    collect(config, silent)
    found = load(tmp_path / "i.gguf")
    entry = found.entries["blk.1.ffn_down_exps.weight"]
    assert entry.sums.shape == (COUNT, 96)
    assert entry.counts[STARVING] == 0
    assert not entry.sums[STARVING].any()
    tokens = found.entries["blk.1.attn_q.weight"].counts
    assert float(entry.counts.sum()) == 2 * float(tokens)


def test_channels_inside_experts_may_be_permuted(tmp_path: Path, ids_file: Path) -> None:
    base = make_model("qwen2_moe", tmp_path / "tiny", tied=False)
    config = settings(
        base, tmp_path / "out", ids_file, formats=("gguf",), measure=("gguf",), permute_mlp=True
    )
    convert(config)
    plan = make_plan(config)
    (output,) = make_outputs(plan)[0]
    rows = plan.checked_rows()[0]
    wanted, found = whole_logits(base, rows), streamed_logits(output.opened(tmp_path / "out" / "gguf"), rows)
    if llamacpp.available():
        check_in_llama_cpp(next((tmp_path / "out" / "gguf").glob("*.gguf")), rows, wanted, found)


def test_activations_that_overflow_are_found_before_the_experts(tmp_path: Path, ids_file: Path) -> None:
    base = make_model("mixtral", tmp_path / "base", tied=False)
    norms = load_file(base / "model.safetensors")["model.layers.1.post_attention_layernorm.weight"]
    name = "model__layers__1__post_attention_layernorm__weight"
    edit_tensors(base / "model.safetensors", **{name: torch.full_like(norms, 3e38)})
    plan = make_plan(settings(base, tmp_path / "out", ids_file, objective="output-error"))
    (tmp_path / "work").mkdir()
    with pytest.raises(ModelError, match=r"block 1, routed: -?inf in calibration row"):
        measured.measured(plan, tmp_path / "work", {}, silent)


def test_a_template_of_a_model_with_experts_gives_the_same_tensors(tmp_path: Path, ids_file: Path) -> None:
    base = make_model("qwen2_moe", tmp_path / "tiny", tied=False)
    common: dict[str, Any] = {"formats": ("gguf",), "measure": None, "bits": None}
    convert(settings(base, tmp_path / "f32", ids_file, gguf_type="F32", **common))
    (template,) = (tmp_path / "f32" / "gguf").glob("*.gguf")
    for name, given in (("own", None), ("templated", template)):
        convert(settings(base, tmp_path / name, ids_file, gguf_type="Q4_K_M", gguf_template=given, **common))
    own, templated = (Stored.read(tmp_path / name / "gguf") for name in ("own", "templated"))
    assert own.types == templated.types
    for name, tensor in own.tensors.items():
        assert (tensor.data == templated.tensors[name].data).all(), name


def test_of_many_experts_with_few_tokens_those_of_fewest_are_named(tmp_path: Path) -> None:
    told = Remarks(tmp_path, "gguf")
    for expert in range(8):
        for name, reached in (("gate_proj", 10 - expert), ("down_proj", 10 - expert)):
            told.note(f"model.layers.0.mlp.experts.{expert}.{name}", 0, 0, reached)
    (line,) = Remarks(tmp_path, "gguf").lines()
    assert line.startswith("8 experts get fewer tokens than they have input channels")
    assert "experts.7 (3), model.layers.0.mlp.experts.6 (4)" in line
    assert "experts.3 (7) and 3 more" in line
