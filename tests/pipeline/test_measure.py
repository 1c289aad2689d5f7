"""The measuring pass: complete, on the right rows, interrupted and taken up again, reused or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from exlq import measurement
from exlq.errors import InputError, MeasurementError
from exlq.formats.codecs import CODECS
from exlq.formats.exl2_options import HEAD_OPTIONS, OPTIONS
from exlq.measurement import LinearRecord
from exlq.models.model import Model
from exlq.numerics import hessian
from exlq.pipeline import measure, sensitivity
from exlq.pipeline.config import ConvertConfig
from exlq.pipeline.plan import make_plan
from exlq.pipeline.trial import Evidence
from tests.helpers import make_model
from tests.models.conftest import whole_model
from tests.pipeline.conftest import Finished, TinyMaker
from tests.pipeline.helpers import Events, block_is_read, contents, convert, copied, settings, write_ids

KEYS = [
    *(
        f"model.layers.{index}.{name}_proj"
        for index in range(2)
        for name in (*(f"self_attn.{n}" for n in "qkvo"), "mlp.gate", "mlp.up", "mlp.down")
    ),
    "lm_head",
    "model.embed_tokens",
]


def measured_only(in_dir: Path, out: Path, calibration: Path, **changes: Any) -> ConvertConfig:
    return settings(
        in_dir,
        out,
        calibration,
        **{"bits": None, "output_measurement": out.parent / f"{out.name}.json", **changes},
    )


@pytest.fixture(scope="module")
def record(finished: Finished) -> measurement.Measurement:
    return measurement.load(finished.measurement)


def test_the_record_holds_every_option_of_every_linear_in_model_order(
    record: measurement.Measurement,
) -> None:
    assert [linear.key for linear in record.linears] == KEYS
    *decoder, head, embedding = record.linears
    for linear in decoder:
        assert [(o.desc, o.qparams) for o in linear.options] == [(o.desc, o.qparams) for o in OPTIONS]
    assert [o.desc for o in head.options] == [o.desc for o in HEAD_OPTIONS.values()]
    assert [(o.desc, o.bpw, o.err, o.loss) for o in embedding.options] == [("f16", 16.0, 0.0, 0.0)]
    assert all(linear.sensitivity and linear.sensitivity > 0 for linear in (*decoder, head))


def test_sizes_in_the_record_are_those_of_the_model(record: measurement.Measurement, llama: Path) -> None:
    numel = {
        f"{name}": module.weight.numel()
        for name, module in whole_model(llama).named_modules()
        if isinstance(module, (nn.Linear, nn.Embedding))
    }
    assert {linear.key: linear.numel for linear in record.linears} == numel


def pure(linear: LinearRecord, bits: int) -> float:
    """The error with one width throughout, in the smallest groups there are."""
    return min(option.err for option in linear.options if option.qparams["bits"] == [bits])


def test_errors_fall_with_the_bits(record: measurement.Measurement) -> None:
    for linear in record.linears[:-2]:
        errors = [pure(linear, bits) for bits in (2, 3, 4, 5, 6)]
        assert all(worse > 2 * better > 0 for worse, better in pairwise(errors))
        for option in linear.options:
            assert all(option.err < o.err for o in linear.options if o.bpw < option.bpw - 1)
            assert 0.3 < option.err_heldout / option.err < 3
            assert 0 < option.loss < linear.sensitivity * 2  # type: ignore[operator]


def test_hessians_are_of_the_models_own_inputs_on_the_rows_each_is_for(
    tiny: TinyMaker, ids_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tiny("phi3", False)
    calibration: list[Tensor] = []
    heldout: dict[str, Tensor] = {}
    real_factor, real_record = hessian.factor, measure._record

    def factor(matrix: Tensor, **arguments: Any) -> hessian.Factor:
        calibration.append(matrix.clone())
        return real_factor(matrix, **arguments)

    def recording(plan: Any, spec: Any, of: Callable[[Any], Evidence], *rest: Any) -> measure.Pending:
        evidence = of(CODECS["exl2"])
        back = torch.argsort(evidence.factor.perm)
        heldout[spec.key] = evidence.heldout[back][:, back]
        return real_record(plan, spec, of, *rest)

    monkeypatch.setattr(hessian, "factor", factor)
    monkeypatch.setattr(measure, "_record", recording)
    config = measured_only(directory, tmp_path / "out", ids_file)
    convert(config)
    rows = measure_rows(config)
    modules = ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"]
    paths = [f"model.layers.{index}.{module}" for index in range(2) for module in modules] + ["lm_head"]
    keys = [KEYS[i] for i in (0, 3, 4, 6, 7, 10, 11, 13, 14)]
    wanted = [input_hessians(directory, paths, part) for part in rows]
    for i, (path, key) in enumerate(zip(paths, keys, strict=True)):
        assert (calibration[i] - wanted[0][path]).norm() < 1e-4 * wanted[0][path].norm(), path
        assert (heldout[key] - wanted[1][path]).norm() < 1e-4 * wanted[1][path].norm(), path
        assert (wanted[0][path] - wanted[1][path]).norm() > 0.01 * wanted[1][path].norm()


def measure_rows(config: ConvertConfig) -> tuple[Tensor, Tensor]:
    rows = make_plan(config).measurement_rows
    return rows.ids[~rows.heldout], rows.ids[rows.heldout]


def input_hessians(directory: Path, paths: list[str], rows: Tensor) -> dict[str, Tensor]:
    """E[x xᵀ] of every module's input in transformers' whole model, float64."""
    model, found = whole_model(directory), dict[str, Tensor]()
    for path in paths:

        def watch(_module: nn.Module, args: tuple[Tensor, ...], path: str = path) -> None:
            x = args[0].double().flatten(0, 1)
            found[path] = x.T @ x / len(x)

        model.get_submodule(path).register_forward_pre_hook(watch)
    with torch.no_grad():
        model(input_ids=rows, use_cache=False)
    return found


def test_no_gradient_is_taken_on_a_held_out_row(
    llama: Path, ids_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    real = sensitivity.fisher

    def recording(model: Model, rows: Tensor, *rest: Any) -> sensitivity.Sensitivity:
        seen.append(rows)
        return real(model, rows, *rest)

    monkeypatch.setattr(sensitivity, "fisher", recording)
    config = measured_only(llama, tmp_path / "out", ids_file)
    convert(config)
    own, _ = measure_rows(config)
    assert torch.equal(seen[0], own)


@pytest.mark.parametrize("stop_at", [("gradients", 3), ("measuring", 1), ("measuring", 2)])
def test_an_interrupted_measurement_goes_on_to_the_identical_record(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: tuple[str, int]
) -> None:
    config = replace(finished.config, out_dir=tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        convert(config, Events(stop_at))
    assert not (tmp_path / "out" / "measurement.json").exists()
    tried: list[str] = []
    real = measure._record

    def recording(plan: Any, spec: Any, *rest: Any) -> measure.Pending:
        tried.append(spec.key)
        return real(plan, spec, *rest)

    monkeypatch.setattr(measure, "_record", recording)
    events = Events()
    convert(config, events)
    assert tried == KEYS[7 * stop_at[1] if stop_at[0] == "measuring" else 0 : -1]
    assert ("gradients" in events.stages) == (stop_at[0] == "gradients")
    assert (tmp_path / "out" / "measurement.json").read_bytes() == finished.measurement.read_bytes()
    assert contents(tmp_path / "out" / "exl2") == contents(finished.model)


def test_what_was_begun_with_other_settings_is_not_taken_up(finished: Finished, tmp_path: Path) -> None:
    config = replace(finished.config, out_dir=tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        convert(replace(config, seed=1), Events(("measuring", 2)))
    convert(config)
    assert (tmp_path / "out" / "measurement.json").read_bytes() == finished.measurement.read_bytes()


@pytest.mark.parametrize("as_directory", [False, True])
def test_a_measurement_alone_goes_where_it_was_asked_and_into_the_job(
    finished: Finished, tmp_path: Path, as_directory: bool
) -> None:
    place = tmp_path / "place"
    if as_directory:
        place.mkdir()
    config = replace(finished.config, out_dir=tmp_path / "out", bits=None, output_measurement=place)
    events = Events()
    assert convert(config, events) == {}
    file = place / "measurement.json" if as_directory else place
    assert file.read_bytes() == (tmp_path / "out" / "measurement.json").read_bytes()
    assert measurement.load(file).linears == measurement.load(finished.measurement).linears
    assert events.stages == {"gradients", "measuring"}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["measurement.json", "work"]
    assert [path.name for path in (tmp_path / "out" / "work").iterdir()] == ["job.json"]


@pytest.mark.parametrize("as_directory", [False, True])
def test_a_measurement_used_again_gives_the_identical_model_without_measuring(
    finished: Finished, tmp_path: Path, as_directory: bool
) -> None:
    given = finished.measurement.parent if as_directory else finished.measurement
    events = Events()
    convert(replace(finished.config, out_dir=tmp_path / "out", measurement=given), events)
    assert events.stages == {"gradients", "quantizing exl2", "verifying exl2"}
    assert contents(tmp_path / "out" / "exl2") == contents(finished.model)
    kept = measurement.load(tmp_path / "out" / "measurement.json")
    assert kept.linears == measurement.load(finished.measurement).linears


def changed_model(finished: Finished, tmp_path: Path) -> ConvertConfig:
    return replace(finished.config, in_dir=make_model("llama", tmp_path / "model", tied=False, seed=1))


def changed_tokenizer(finished: Finished, tmp_path: Path) -> ConvertConfig:
    path = copied(finished.config.in_dir, tmp_path / "model") / "tokenizer_config.json"
    path.write_text(path.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    return replace(finished.config, in_dir=tmp_path / "model")


def changed_calibration(finished: Finished, tmp_path: Path) -> ConvertConfig:
    return replace(finished.config, calibration=write_ids(tmp_path / "ids.parquet", seed=1))


DIFFERENCES: dict[str, Callable[[Finished, Path], ConvertConfig]] = {
    "model sha256 model.safetensors": changed_model,
    "model tokenizer_sha256": changed_tokenizer,
    "calibration sha256": changed_calibration,
    "calibration row_length": lambda finished, _: replace(finished.config, measurement_length=32),
    "settings seed": lambda finished, _: replace(finished.config, seed=1),
    "settings states": lambda finished, _: replace(finished.config, states="bf16"),
    "settings rounding": lambda finished, _: replace(finished.config, gptq=False),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_measurement_of_something_else_is_refused_with_the_difference_named(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    config = DIFFERENCES[name](finished, tmp_path)
    config = replace(config, out_dir=tmp_path / "out", measurement=finished.measurement)
    with monkeypatch.context() as patched:
        patched.setattr(Model, "block", block_is_read)
        with pytest.raises(MeasurementError, match=f"{name}: measured .*, now .*--force-measurement"):
            convert(config)
    assert convert(replace(config, force_measurement=True))["outputs"]["exl2"]["bpw"] <= 6.0


BREAKAGES: dict[str, Callable[[Any], Any]] = {
    "lacks model.layers.1.mlp.up_proj": lambda tree: tree["measurement"].pop(12),
    "lacks err_heldout": lambda tree: tree["measurement"][2]["options"][3].pop("err_heldout"),
    "is recorded twice": lambda tree: tree["measurement"].append(tree["measurement"][0]),
    "bpw is 9, but": lambda tree: tree["measurement"][1]["options"][0].update(bpw=9),
    "version is 2": lambda tree: tree.update(version=2),
}


@pytest.mark.parametrize("message", BREAKAGES)
def test_a_damaged_measurement_is_refused_before_a_block_is_read(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    tree = json.loads(finished.measurement.read_text(encoding="utf-8"))
    BREAKAGES[message](tree)
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(tree), encoding="utf-8")
    monkeypatch.setattr(Model, "block", block_is_read)
    with pytest.raises(InputError, match=message):
        convert(replace(finished.config, out_dir=tmp_path / "out", measurement=path))


def test_states_in_bf16_are_half_as_large_and_said_in_the_record(finished: Finished, tmp_path: Path) -> None:
    places: dict[str, Any] = {"out_dir": tmp_path / "out", "output_measurement": tmp_path / "m.json"}
    config = replace(finished.config, states="bf16", bits=None, **places)
    with pytest.raises(KeyboardInterrupt):
        convert(config, Events(("measuring", 1)))
    assert (tmp_path / "out" / "work" / "states.bin").stat().st_size == 24 * 64 * 64 * 2
    convert(config)
    found, full = (measurement.load(path) for path in (tmp_path / "m.json", finished.measurement))
    assert (found.settings["states"], full.settings["states"]) == ("bf16", "float32")
    for one, other in zip(found.linears[7:14], full.linears[7:14], strict=True):
        assert one.options != other.options
        assert pure(one, 4) == pytest.approx(pure(other, 4), rel=0.05)


def test_without_gradients_a_loss_is_the_outputs_relative_error(
    llama: Path, tmp_path: Path, ids_file: Path
) -> None:
    config = replace(measured_only(llama, tmp_path / "out", ids_file), objective="output-error")
    events = Events()
    convert(config, events)
    assert "gradients" not in events.stages
    assert config.output_measurement is not None
    found = measurement.load(config.output_measurement)
    for linear in found.linears:
        assert [option.loss for option in linear.options] == [o.err_heldout for o in linear.options]
