"""Conversions with --permute-mlp: what the files tell, how they run, and what they are not taken for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from exlq.errors import MeasurementError, ModelError
from exlq.evaluation import llamacpp
from exlq.pipeline import job
from exlq.pipeline.plan import PERMUTED, make_plan
from tests.helpers import make_model
from tests.models.conftest import whole_logits
from tests.pipeline.conftest import Finished
from tests.pipeline.helpers import Stored, convert, made_up, settings

FLOATS = {"bits": None, "gguf_type": "F32", "formats": ("gguf",), "permute_mlp": True}


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama whose heads have channels enough to be reordered."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    return make_model("llama", tmp_path_factory.mktemp("roomy") / "roomy", tied=False, **sizes)


@pytest.fixture(scope="module")
def floats(roomy: Path, ids_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """It as F32, permuted: nothing is rounded."""
    config = settings(roomy, tmp_path_factory.mktemp("floats") / "out", ids_file, **FLOATS)
    return Finished(config, convert(config))


@pytest.fixture(scope="module")
def mixed(roomy: Path, ids_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """It at 4.5 bits per weight in both formats, by a record that is made up."""
    place = tmp_path_factory.mktemp("mixed")
    wanted = {"bits": 4.5, "formats": None, "measure": None, "permute_mlp": True}
    config = settings(roomy, place / "out", ids_file, **wanted)
    config = replace(config, measurement=made_up(config, place / "measurement.json"))
    return Finished(config, convert(config))


def test_gguf_tells_and_its_channels_are_the_bases_in_another_order(
    floats: Finished, roomy: Path, ids_file: Path, tmp_path: Path
) -> None:
    stored = Stored.read(floats.gguf)
    assert stored.fields["exlq.permute_mlp"] is True
    convert(settings(roomy, tmp_path / "plain", ids_file, **{**FLOATS, "permute_mlp": False}))
    plain = Stored.read(tmp_path / "plain" / "gguf")
    assert "exlq.permute_mlp" not in plain.fields
    moved = {name for name, tensor in plain.tensors.items() if not same(tensor, stored.tensors[name])}
    names = ("ffn_gate", "ffn_up", "ffn_down", "attn_v", "attn_output")
    assert moved == {f"blk.{block}.{name}.weight" for block in range(2) for name in names}
    for name in moved:
        before, after = (np.sort(each.tensors[name].data.ravel()) for each in (plain, stored))
        assert np.array_equal(before, after), name


def same(one: object, other: object) -> bool:
    return bool(np.array_equal(one.data, other.data))  # type: ignore[attr-defined]


def test_llama_cpp_computes_from_it_what_transformers_do_from_the_base(floats: Finished) -> None:
    if not llamacpp.available():
        pytest.skip("llama.cpp is not installed (exlq[eval])")
    rows = make_plan(floats.config).checked_rows()[0][:2]
    (path,) = floats.gguf.glob("*.gguf")
    with llamacpp.Runtime(path) as runtime:
        found = torch.stack([runtime.logits(row) for row in rows])
    wanted = whole_logits(floats.config.in_dir, rows)
    assert float((found - wanted).abs().max()) < 2e-4 * float(wanted.abs().max())


def test_the_summary_says_what_no_longer_fits(mixed: Finished, floats: Finished) -> None:
    for made in (*mixed.summary["outputs"].values(), *floats.summary["outputs"].values()):
        assert PERMUTED in made["notes"]
    assert mixed.summary["settings"]["permute_mlp"] is True


def test_quantized_files_diverge_from_the_base_as_little_as_their_bits_let_them(mixed: Finished) -> None:
    for name, made in mixed.summary["outputs"].items():
        assert 0 < made["evaluation"]["kl_mean"] < 0.05, name


def test_an_exl2_directory_tells_beside_our_version(mixed: Finished, finished: Finished) -> None:
    told, plain = (
        json.loads((each.model / "config.json").read_text(encoding="utf-8"))["quantization_config"]
        for each in (mixed, finished)
    )
    assert told["permute_mlp"] is True
    assert "permute_mlp" not in plain


@pytest.mark.parametrize("measured_permuted", [True, False])
def test_a_measurement_of_the_other_order_is_refused(
    measured_permuted: bool, roomy: Path, ids_file: Path, tmp_path: Path
) -> None:
    config = settings(roomy, tmp_path / "out", ids_file, permute_mlp=measured_permuted)
    path = made_up(config, tmp_path / "measurement.json")
    job.rehearse(replace(config, measurement=path))
    with pytest.raises(MeasurementError, match="settings permute_mlp"):
        job.rehearse(replace(config, measurement=path, permute_mlp=not measured_permuted))


def test_a_template_of_the_base_gives_the_same_blocks(
    floats: Finished, roomy: Path, ids_file: Path, tmp_path: Path
) -> None:
    plain = convert(settings(roomy, tmp_path / "plain", ids_file, **{**FLOATS, "permute_mlp": False}))
    template = Path(plain["outputs"]["gguf"]["paths"][0])
    convert(settings(roomy, tmp_path / "out", ids_file, **FLOATS, gguf_template=template))
    made, wanted = Stored.read(tmp_path / "out" / "gguf"), Stored.read(floats.gguf)
    assert made.types == wanted.types
    assert all(same(tensor, made.tensors[name]) for name, tensor in wanted.tensors.items())
    assert made.fields["exlq.permute_mlp"] is True


def test_a_permuted_file_is_no_template(
    floats: Finished, roomy: Path, ids_file: Path, tmp_path: Path
) -> None:
    (template,) = floats.gguf.glob("*.gguf")
    with pytest.raises(ModelError, match="does not hold the values of"):
        convert(settings(roomy, tmp_path / "out", ids_file, **FLOATS, gguf_template=template))
