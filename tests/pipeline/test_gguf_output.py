"""A job that writes GGUF: what the file holds, as another reader finds it, and what it does not hold."""

from __future__ import annotations

import json
import platform
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from exlq import __version__, measurement
from exlq.errors import VerifyError
from exlq.evaluation import llamacpp
from exlq.formats.gguf.overrides import parse_overrides, pinned, read_type_file
from exlq.formats.gguf.writer import GgufWriter
from exlq.pipeline import job, verify
from exlq.pipeline.config import ConvertConfig
from exlq.pipeline.gguf_output import GgufOutput
from exlq.pipeline.plan import make_plan
from tests.models.conftest import whole_logits
from tests.pipeline.conftest import Finished
from tests.pipeline.helpers import (
    Events,
    Stored,
    contents,
    convert,
    file_bytes,
    settings,
)

PROVENANCE = {
    "exlq.version",
    "exlq.target",
    "exlq.rounding",
    "exlq.bits_per_weight",
    "exlq.predicted_kl",
    "exlq.settings.sha256",
    "exlq.calibration.sha256",
    "exlq.calibration.rows",
    "exlq.calibration.row_length",
    "exlq.calibration.seed",
}


@pytest.fixture(scope="module")
def stored(both: Finished) -> Stored:
    return Stored.read(both.gguf)


@pytest.fixture
def again(both: Finished, tmp_path: Path) -> ConvertConfig:
    """The GGUF part of the finished conversion elsewhere, its measurement given."""
    return replace(both.config, out_dir=tmp_path / "out", measurement=both.measurement, formats=("gguf",))


@pytest.fixture(scope="module")
def small(llama: Path, ids_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The tiny llama, whose rows no block of 256 divides, in both formats."""
    out = tmp_path_factory.mktemp("small") / "out"
    config = settings(llama, out, ids_file, formats=None, measure=None)
    return Finished(config, convert(config))


def test_without_format_one_job_makes_both(both: Finished) -> None:
    out = both.config.out_dir
    names = {"exl2", "gguf", "measurement.json", "summary.json", "work"}
    assert {path.name for path in out.iterdir()} == names
    assert {path.name for path in (out / "work").iterdir()} == {"job.json", "tensors", "gradients"}
    assert list(both.summary["outputs"]) == ["exl2", "gguf"]
    assert list(both.summary["notes"]) == []
    for made in both.summary["outputs"].values():
        assert 4.45 < made["bpw"] <= 4.5
        assert 0 < made["evaluation"]["kl_mean"] < 0.05
        assert made["predicted_kl"] / 3 < made["evaluation"]["kl_mean"] < made["predicted_kl"] * 3


def test_the_record_of_both_holds_both_formats_options(both: Finished) -> None:
    record = measurement.load(both.measurement)
    formats = {linear.key: {option.format for option in linear.options} for linear in record.linears}
    assert set(map(frozenset, formats.values())) == {frozenset({"exl2", "gguf"})}
    assert record.extra["evaluations"].keys() == {"exl2 -b 4.5 -hb 6", "gguf -b 4.5 -hb 6"}


def test_another_reader_finds_every_tensor_as_the_summary_has_it(both: Finished, stored: Stored) -> None:
    made = both.summary["outputs"]["gguf"]
    assert stored.types == made["types"]
    assert list(stored.types) == list(made["types"]), "in its order"
    sizes = {name: int(tensor.n_bytes) for name, tensor in stored.tensors.items()}
    assert sizes == made["tensor_bytes"]
    assert made["file_bytes"] == made["bytes"] == file_bytes(both.gguf)


def test_bits_per_weight_counted_in_the_file_alone_are_those_told_and_not_above_the_target(
    both: Finished, stored: Stored
) -> None:
    assert stored.decoder_bpw == pytest.approx(both.summary["outputs"]["gguf"]["bpw"], abs=1e-12)
    assert 4.45 < stored.decoder_bpw <= 4.5
    numel = sum(int(t.n_elements) for t in stored.tensors.values() if len(t.shape) == 2)
    assert both.summary["outputs"]["gguf"]["file_bpw"] == pytest.approx(8 * file_bytes(both.gguf) / numel)


def test_norms_are_float32_and_the_types_are_mixed(stored: Stored) -> None:
    vectors = {name for name, tensor in stored.tensors.items() if len(tensor.shape) == 1}
    assert vectors == {name for name, kind in stored.types.items() if kind == "F32"}
    assert len(vectors) == 5
    assert len(set(stored.types.values())) > 4


def test_its_name_says_the_size_of_the_model_and_the_target(both: Finished) -> None:
    assert [path.name for path in sorted(both.gguf.iterdir())] == [
        "README.md",
        "Wide-1.0M-4.50bpw.gguf",
        "Wide-1.0M-4.50bpw.types.txt",
    ]


def test_provenance_is_told_and_nothing_of_the_machine_or_the_day(both: Finished, stored: Stored) -> None:
    assert {key for key in stored.fields if key.startswith("exlq.")} == PROVENANCE
    assert stored.fields["exlq.version"] == __version__
    assert stored.fields["exlq.target"] == "-b 4.5"
    assert stored.fields["exlq.rounding"] == "gptq"
    assert stored.fields["exlq.bits_per_weight"] == stored.decoder_bpw
    record = both.summary["calibration"]
    assert stored.fields["exlq.calibration.sha256"] == record["sha256"]
    assert stored.fields["exlq.calibration.rows"] == record["rows"]
    told = json.dumps({key: str(value) for key, value in stored.fields.items()})
    for machine in (str(both.config.out_dir.parent), str(both.config.in_dir.parent), platform.node()):
        assert machine not in told
    year = both.summary["seconds"]  # what the summary alone tells
    assert not any(str(seconds) in told for seconds in year.values())


def test_another_place_and_a_measurement_taken_anew_give_the_same_bytes(
    small: Finished, tmp_path: Path
) -> None:
    config = replace(small.config, out_dir=tmp_path / "elsewhere" / "out", threads=1)
    convert(config)
    assert contents(config.out_dir / "gguf") == contents(small.gguf)
    assert contents(config.out_dir / "exl2") == contents(small.model)


def test_a_second_format_changes_nothing_of_the_first(small: Finished, finished: Finished) -> None:
    assert contents(small.model) == contents(finished.model)
    alone = {linear.key: linear for linear in measurement.load(finished.measurement).linears}
    for linear in measurement.load(small.measurement).linears:
        own = tuple(option for option in linear.options if option.format == "exl2")
        assert own == alone[linear.key].options


def test_a_measurement_left_by_another_seeds_run_is_not_felt(small: Finished, tmp_path: Path) -> None:
    config = replace(small.config, out_dir=tmp_path / "out", formats=("gguf",))
    with pytest.raises(KeyboardInterrupt):
        convert(replace(config, seed=1), Events(("measuring", 1)))
    convert(replace(config, measurement=small.measurement))
    assert contents(tmp_path / "out" / "gguf") == contents(small.gguf)


def test_the_types_beside_the_file_give_stock_quantize_the_same_mix(both: Finished, stored: Stored) -> None:
    items = read_type_file(both.gguf / "Wide-1.0M-4.50bpw.types.txt")
    overrides = parse_overrides(items)
    found = {name: pinned(overrides, name, tied=False) for name in stored.types}
    assert found == {name: None if kind == "F32" else kind for name, kind in stored.types.items()}


def kl(base: Tensor, other: Tensor) -> float:
    """Over the second halves of rows, as is scored everywhere."""
    half = base.shape[1] // 2
    log_p, log_q = (x[:, half:-1].double().log_softmax(-1) for x in (base, other))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def test_llama_cpp_runs_the_mixed_file_as_torch_does(both: Finished) -> None:
    if not llamacpp.available():
        pytest.skip("llama.cpp is not installed (exlq[eval])")
    rows = make_plan(both.config).checked_rows()[0]
    (path,) = both.gguf.glob("*.gguf")
    with llamacpp.Runtime(path) as runtime:
        found = torch.stack([runtime.logits(row) for row in rows])
    measured = both.summary["outputs"]["gguf"]["evaluation"]["kl_mean"]
    assert kl(whole_logits(both.config.in_dir, rows), found) == pytest.approx(measured, rel=0.15)


def test_a_byte_that_changes_between_writing_and_reading_fails_the_job(
    again: ConvertConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = GgufWriter.close

    def corrupting(writer: GgufWriter) -> tuple[Path, ...]:
        paths = real(writer)
        data = bytearray(paths[0].read_bytes())
        data[-100_000] ^= 1
        paths[0].write_bytes(data)
        return paths

    monkeypatch.setattr(GgufWriter, "close", corrupting)
    with pytest.raises(VerifyError, match=r"\.weight is not what was written"):
        convert(again)
    assert not (again.out_dir / "gguf").exists()
    assert not (again.out_dir / "summary.json").exists()


def test_a_model_worse_than_its_measurement_explains_is_not_put_in_place(
    again: ConvertConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "ALLOWED_KL", 0.0)
    monkeypatch.setattr(verify, "ALLOWED_RATIO", 0.1)
    with pytest.raises(VerifyError, match="not to be trusted and was not put in place"):
        convert(again)
    assert not (again.out_dir / "gguf").exists()


def test_a_finished_job_is_known_again_while_both_results_stand(both: Finished) -> None:
    assert job.finished_summary(both.config) is not None
    (path,) = both.gguf.glob("*.types.txt")
    path.rename(path.with_suffix(".moved"))
    assert job.finished_summary(both.config) is None
    path.with_suffix(".moved").rename(path)


def test_the_output_opens_what_it_wrote_as_the_same_model(both: Finished, stored: Stored) -> None:
    model = GgufOutput(make_plan(both.config)).opened(both.gguf)
    for key, name in (("model.layers.1.mlp.down_proj", "blk.1.ffn_down"), ("lm_head", "output")):
        assert torch.equal(model.linear_weight(key), stored.values(f"{name}.weight"))
