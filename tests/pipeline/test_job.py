"""A job from the first run to the last: what it leaves, what it replaces, and what it never does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from exlq import measurement
from exlq.errors import VerifyError
from exlq.evaluation.divergence import Divergence
from exlq.formats.exl2_directory import Exl2Weights, Exl2Writer
from exlq.models.model import Model
from exlq.models.open import open_model
from exlq.pipeline import job, verify
from exlq.pipeline.config import ConvertConfig
from tests.models.conftest import streamed_logits, whole_logits
from tests.pipeline.conftest import Finished
from tests.pipeline.helpers import Events, block_is_read, contents, convert

ALL_STAGES = {"gradients", "measuring", "quantizing exl2", "verifying exl2"}


@pytest.fixture
def again(finished: Finished, tmp_path: Path) -> ConvertConfig:
    """The finished conversion elsewhere, its measurement given, so that it takes little time."""
    return replace(finished.config, out_dir=tmp_path / "out", measurement=finished.measurement)


def failing(*_: Any, **__: Any) -> Divergence:
    raise VerifyError("the disk is broken")


def test_a_job_leaves_its_model_its_measurement_its_summary_and_no_large_file(finished: Finished) -> None:
    out = finished.config.out_dir
    assert {path.name for path in out.iterdir()} == {"exl2", "measurement.json", "summary.json", "work"}
    assert {path.name for path in (out / "work").iterdir()} == {"job.json", "tensors", "gradients"}
    assert len(list((out / "work" / "tensors").iterdir())) == 15
    assert (out / "work" / "job.json").stat().st_size < 4000


def test_the_same_job_twice_gives_the_same_bytes(finished: Finished, tmp_path: Path) -> None:
    convert(replace(finished.config, out_dir=tmp_path / "other"))
    assert contents(tmp_path / "other" / "exl2") == contents(finished.model)
    assert (tmp_path / "other" / "measurement.json").read_bytes() == finished.measurement.read_bytes()


def test_another_seed_gives_other_rows_and_another_model(again: ConvertConfig, finished: Finished) -> None:
    convert(replace(again, seed=1, force_measurement=True))
    other = load_file(again.out_dir / "exl2" / "output.safetensors")
    mine = load_file(finished.model / "output.safetensors")
    assert other.keys() == mine.keys()
    changed = [name for name in mine if name.endswith("q_weight") and not mine[name].equal(other[name])]
    assert len(changed) == 15


def test_the_summary_holds_the_figures_of_this_run(finished: Finished) -> None:
    summary = finished.summary
    stored = json.loads((finished.config.out_dir / "summary.json").read_text(encoding="utf-8"))
    assert stored == json.loads(json.dumps(summary))
    assert summary["target"] == {"-b": 6.0}
    assert summary["outputs"].keys() == {"exl2"}
    assert stored["notes"] == [], "no format was left out"
    assert summary["command"] == "a command"
    assert summary["calibration_text"]["kind"] == "input_ids"
    assert summary["seconds"].keys() == {"measuring", "allocating", "quantizing", "verifying"}
    assert all(seconds > 0 for seconds in summary["seconds"].values())
    size = (finished.model / "output.safetensors").stat().st_size
    base = (finished.config.in_dir / "model.safetensors").stat().st_size
    output = summary["outputs"]["exl2"]
    assert (output["bytes"], summary["base_bytes"]) == (size, base)
    assert output["paths"] == [str(finished.model)]
    assert summary["measurement"] == str(finished.measurement)
    assert summary["settings"]["states"] == "float32"
    assert summary["calibration"]["file"] == "ids.parquet"
    assert summary["machine"]["threads"] == torch.get_num_threads()
    assert output["optimality_gap"] >= 0
    assert output["head_bits"] == 6


def test_the_summary_names_the_way_every_linear_is_stored(finished: Finished) -> None:
    record = measurement.load(finished.measurement)
    sizes = {(x.key, o.desc): o.total_bits for x in record.linears for o in x.options}
    output = finished.summary["outputs"]["exl2"]
    allocation = dict(output["allocation"])
    assert allocation.pop("lm_head") == "0.15:8b/0.85:6b 32g s4"
    assert len(allocation) == 14
    total = sum(sizes[key, desc] for key, desc in allocation.items())
    numel = sum(x.numel for x in record.linears if x.key in allocation)
    assert total / numel == output["bpw"]


def test_the_record_says_what_was_predicted_and_what_was_measured(finished: Finished) -> None:
    (name, found), *others = measurement.load(finished.measurement).extra["evaluations"].items()
    assert not others
    assert name == "exl2 -b 6.0 -hb 6"
    output = finished.summary["outputs"]["exl2"]
    evaluation = output["evaluation"]
    assert found["measured"] == evaluation
    assert found["predicted_kl"] == output["predicted_kl"]
    assert found["predicted_kl"] / 3 < evaluation["kl_mean"] < found["predicted_kl"] * 3


def test_a_finished_job_is_known_again_by_its_settings_and_its_inputs(
    again: ConvertConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert job.finished_summary(again) is None
    summary = convert(again)
    monkeypatch.setattr(Model, "block", block_is_read)
    found = job.finished_summary(again)
    assert found is not None
    assert found["outputs"] == json.loads(json.dumps(summary["outputs"]))
    assert job.finished_summary(replace(again, threads=2)) is not None
    changed: list[dict[str, Any]] = [{"bits": 5.0}, {"head_bits": 8}, {"seed": 1}, {"no_resume": True}]
    changed += [{"formats": None}, {"gptq": False}, {"measure": None}]
    for changes in changed:
        assert job.finished_summary(replace(again, **changes)) is None
    (again.out_dir / "exl2").rename(again.out_dir / "elsewhere")
    assert job.finished_summary(again) is None
    (again.out_dir / "elsewhere").rename(again.out_dir / "exl2")
    (again.out_dir / "summary.json").write_text("{", encoding="utf-8")
    assert job.finished_summary(again) is None


def test_no_resume_does_everything_again(finished: Finished, tmp_path: Path) -> None:
    config = replace(finished.config, out_dir=tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        convert(config, Events(("measuring", 2)))
    resumed, anew = Events(), Events()
    convert(config, resumed)
    assert resumed.stages == ALL_STAGES - {"gradients"}
    convert(replace(config, no_resume=True), anew)
    assert anew.stages == ALL_STAGES
    assert contents(tmp_path / "out" / "exl2") == contents(finished.model)


def test_another_target_replaces_the_model_only_when_it_is_verified(
    again: ConvertConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(again)
    target = again.out_dir / "exl2"
    old, summary = contents(target), (again.out_dir / "summary.json").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(verify, "verify_model", failing)
        with pytest.raises(VerifyError, match="the disk is broken"):
            convert(replace(again, bits=4.0))
    assert contents(target) == old
    assert (again.out_dir / "summary.json").read_bytes() == summary
    real, seen = verify.judge, []

    def judged(*figures: Any) -> None:
        seen.append(contents(target))
        real(*figures)

    monkeypatch.setattr(verify, "judge", judged)
    new = convert(replace(again, bits=4.0))
    assert seen == [old], "the old model stood while the new one was verified"
    assert new["outputs"]["exl2"]["bpw"] <= 4.0
    assert len(contents(target)["output.safetensors"]) < len(old["output.safetensors"])
    assert {path.name for path in (again.out_dir / "work").iterdir()} == {"job.json", "tensors", "gradients"}


def test_an_interruption_while_quantizing_leaves_the_old_model(
    again: ConvertConfig, finished: Finished
) -> None:
    convert(replace(again, bits=4.0))
    old = contents(again.out_dir / "exl2")
    with pytest.raises(KeyboardInterrupt):
        convert(again, Events(("quantizing exl2", 1)))
    assert contents(again.out_dir / "exl2") == old
    convert(again)
    assert contents(again.out_dir / "exl2") == contents(finished.model)


def test_a_byte_that_changes_between_writing_and_reading_fails_the_job(
    again: ConvertConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Exl2Writer.close

    def corrupting(writer: Exl2Writer, *rest: Any) -> None:
        real(writer, *rest)
        path = again.out_dir / "work" / "exl2" / "output.safetensors"
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    monkeypatch.setattr(Exl2Writer, "close", corrupting)
    with pytest.raises(VerifyError, match="is not what was written"):
        convert(again)
    assert not (again.out_dir / "exl2").exists()
    assert not (again.out_dir / "summary.json").exists()


def test_a_model_worse_than_its_measurement_explains_is_not_put_in_place(
    again: ConvertConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "ALLOWED_KL", 0.001)
    monkeypatch.setattr(verify, "ALLOWED_RATIO", 0.1)
    with pytest.raises(VerifyError, match="not to be trusted and was not put in place"):
        convert(again)
    assert not (again.out_dir / "exl2").exists()


def test_cf_puts_the_model_elsewhere_and_replaces_only_our_own(
    again: ConvertConfig, finished: Finished, tmp_path: Path
) -> None:
    place = tmp_path / "models" / "tiny"
    config = replace(again, compile_full=place)
    summary = convert(config)
    assert contents(place) == contents(finished.model)
    assert summary["outputs"]["exl2"]["paths"] == [str(place)]
    assert not (again.out_dir / "exl2").exists()
    convert(replace(config, bits=5.0))
    assert contents(place) != contents(finished.model)


def test_a_large_model_goes_into_shards_of_the_size_asked_for(bundled: Finished) -> None:
    shards = sorted(bundled.model.glob("*.safetensors"))
    assert [path.name for path in shards] == [
        f"output-0000{i}-of-0000{len(shards)}.safetensors" for i in range(1, len(shards) + 1)
    ]
    assert len(shards) > 1
    assert all(path.stat().st_size <= 2 << 20 for path in shards)
    assert not list(bundled.model.glob("*.index.json"))


def test_a_model_in_shards_reads_back(bundled: Finished) -> None:
    model = open_model(bundled.model, Exl2Weights(bundled.model), device=torch.device("cpu"))
    rows = torch.randint(4, 2000, (2, 32), generator=torch.Generator().manual_seed(0))
    log_p = whole_logits(bundled.config.in_dir, rows).double().log_softmax(-1)
    log_q = streamed_logits(model, rows).double().log_softmax(-1)
    assert 0 < float((log_p.exp() * (log_p - log_q)).sum(-1).mean()) < 0.1


def test_one_held_out_row_is_enough_for_a_job(again: ConvertConfig) -> None:
    config = replace(again, measurement=None, rows=8, measurement_rows=8, length=16, measurement_length=16)
    summary = convert(config)
    evaluation = summary["outputs"]["exl2"]["evaluation"]
    assert evaluation["n_chunks"] == 1
    assert evaluation["kl_se"] > 0
