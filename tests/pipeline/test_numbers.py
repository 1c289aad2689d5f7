"""Values that are no numbers, Hessians of little, faults of what was written: named, or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file

from exlq.cli import main
from exlq.errors import ExlqError, ModelError, VerifyError
from exlq.evaluation import divergence
from exlq.numerics import hessian
from exlq.numerics.hessian import HessianSum
from exlq.pipeline import verify
from exlq.pipeline.plan import make_plan
from exlq.pipeline.remarks import Remarks
from exlq.pipeline.sensitivity import row_namer
from tests.helpers import make_model
from tests.pipeline.helpers import Place, convert, copied, edit_tensors, settings

KEY = "model.layers.1.mlp.up_proj"
NAME = f"{KEY}.weight"


@pytest.fixture
def place(tmp_path: Path, llama: Path, ids_file: Path) -> Place:
    return Place(tmp_path, llama, ids_file)


def with_weight(model: Path, target: Path, name: str, change: Callable[[torch.Tensor], Any]) -> Path:
    """A copy of a model, one tensor changed in place by `change`."""
    copied(model, target)
    tensor = load_file(target / "model.safetensors")[name]
    change(tensor)
    edit_tensors(target / "model.safetensors", **{name.replace(".", "__"): tensor})
    return target


def refusal(place: Place, capsys: pytest.CaptureFixture[str], *more: str, **changed: Path) -> str:
    """The one line of a command that is refused for its input, with nothing in the final places."""
    assert main(place.arguments("--quiet", *more, **changed)) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert {path.name for path in place.out.glob("*")} <= {"work", "job.lock"}
    return line


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("flags", [(), ("--format", "gguf", "--gguf-type", "Q8_0", "--unweighted")])
def test_a_weight_that_is_no_number_is_named_by_tensor_row_and_column(
    place: Place, capsys: pytest.CaptureFixture[str], bad: float, flags: tuple[str, ...]
) -> None:
    def change(tensor: torch.Tensor) -> None:
        tensor[17, 5] = bad

    model = with_weight(place.model, place.directory / "model", NAME, change)
    if flags:
        arguments = ["convert", "-i", str(model), "-o", str(place.out), "-c", str(place.ids), *flags]
        assert main([*arguments, "--quiet"]) == 2
        line = capsys.readouterr().err
    else:
        line = refusal(place, capsys, model=model)
    assert f"{NAME} has {bad} at row 17, column 5, 1 of the" in line


@pytest.mark.parametrize("objective", ["kl", "output-error"])
def test_activations_that_overflow_are_named_by_block_stage_and_row(
    place: Place, capsys: pytest.CaptureFixture[str], objective: str
) -> None:
    model = with_weight(place.model, place.directory / "model", NAME, lambda tensor: tensor.mul_(1e38))
    line = refusal(place, capsys, "--objective", objective, model=model)
    assert "error: block 1, mlp_out: " in line
    assert "calibration row 0 (from 0; token " in line
    assert "ids.parquet), token " in line


def test_where_one_row_alone_overflows_it_is_that_row_which_is_named(
    place: Place, capsys: pytest.CaptureFixture[str], llama: Path
) -> None:
    plan = make_plan(settings(llama, place.out, place.ids))
    rows, states = plan.measurement_rows, plan.model.embed(plan.measurement_rows.ids)
    inputs: dict[str, torch.Tensor] = {}
    for index in range(2):
        with plan.model.block(index) as block:
            states = block.forward(states, inputs.__setitem__)
    reach = next(x for stage, x in inputs.items() if stage == "mlp_out").abs().amax((1, 2))
    second, most = reach.sort().values[-2:].tolist()
    scale = 2 * torch.finfo(torch.float32).max / (second + most)
    model = with_weight(llama, place.directory / "model", NAME, lambda up: up.mul_(scale))
    down = load_file(model / "model.safetensors")[NAME.replace("up", "down")]
    edit_tensors(model / "model.safetensors", **{NAME.replace("up", "down").replace(".", "__"): down / scale})
    line = refusal(place, capsys, "--objective", "output-error", model=model)
    row = int(reach.argmax())
    assert f"inf in calibration row {row} (from 0; token {int(rows.starts[row])} of ids.parquet)" in line


def test_the_gradients_rows_are_called_what_the_calibration_calls_them(llama: Path, ids_file: Path) -> None:
    plan = make_plan(settings(llama, Path("absent"), ids_file, measurement_rows=24))
    taken, name = plan.measurement_rows, row_namer(plan.measurement_rows)
    calibrated = (~taken.heldout).nonzero()[:, 0].tolist()
    assert [name(row) for row in range(3)] == [taken.row_name(row) for row in calibrated[:3]]


def test_weights_beyond_float16_are_refused_by_exl2_with_their_name_and_kept_by_gguf(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(tensor: torch.Tensor) -> None:
        tensor[3, 7] = 1e5

    model = with_weight(place.model, place.directory / "model", NAME, change)
    line = refusal(place, capsys, model=model)
    assert f"{KEY} has weights up to 100000, EXL2 computes in float16" in line


@pytest.mark.parametrize(
    ("name", "place_of"), [("model.norm.weight", (3,)), ("model.embed_tokens.weight", (9, 2))]
)
def test_plain_tensors_beyond_float16_are_refused_before_the_work_begins(
    place: Place, capsys: pytest.CaptureFixture[str], name: str, place_of: tuple[int, ...]
) -> None:
    def change(tensor: torch.Tensor) -> None:
        tensor[place_of] = 1e5

    model = with_weight(place.model, place.directory / "model", name, change)
    assert f"{name} has values up to 100000" in refusal(place, capsys, model=model)


def test_a_bias_beyond_float16_is_refused_before_the_work_begins(tmp_path: Path, ids_file: Path) -> None:
    model = make_model("qwen2", tmp_path / "qwen2", tied=False)
    name = "model.layers.0.self_attn.q_proj.bias"
    biases = load_file(model / "model.safetensors")[name]
    biases[4] = -1e5
    edit_tensors(model / "model.safetensors", **{name.replace(".", "__"): biases})
    with pytest.raises(ModelError, match=f"{name} has values up to 100000"):
        convert(settings(model, tmp_path / "out", ids_file))
    assert not (tmp_path / "out").exists()


def test_the_reference_pass_is_in_float32_whatever_the_checkpoint_is_stored_in(
    llama: Path, tmp_path: Path, ids_file: Path
) -> None:
    directory = copied(llama, tmp_path / "half")
    halves = {
        name.replace(".", "__"): tensor.half()
        for name, tensor in load_file(directory / "model.safetensors").items()
    }
    edit_tensors(directory / "model.safetensors", **halves)
    model = make_plan(settings(directory, tmp_path / "out", ids_file)).model
    seen = set()
    states = model.embed(torch.arange(4, 20).view(2, 8))
    with model.block(0) as block:
        seen |= {parameter.dtype for parameter in block.module.parameters()}
        out = block.forward(states * 1e6, lambda stage, x: seen.add(x.dtype))
    assert seen | {states.dtype, out.dtype} == {torch.float32}
    assert (out.abs() > 65504).any()
    assert out.isfinite().all()


def test_few_tokens_are_reported(llama: Path, tmp_path: Path, ids_file: Path) -> None:
    few = make_plan(settings(llama, tmp_path / "out", ids_file, rows=4, length=64))
    assert any("linears have fewer than 4 of the" in note for note in few.notes)
    plenty = make_plan(settings(llama, tmp_path / "out", ids_file, rows=24, length=64))
    assert plenty.notes == ()


def test_raised_damping_and_dead_channels_are_reported_also_by_a_run_that_goes_on(tmp_path: Path) -> None:
    one = HessianSum.zeros(8, torch.device("cpu"))
    one.add(torch.cat([torch.eye(8)[:6]] * 8))
    whole = hessian.factor(torch.eye(8))
    indefinite = torch.eye(8)
    indefinite[0, 1] = indefinite[1, 0] = 1.5
    raised = hessian.factor(indefinite)
    assert (whole.raised, whole.dead, raised.raised) == (0, 0, 2)
    begun = Remarks(tmp_path, "exl2")
    begun.note("a", whole.raised, whole.dead)
    assert not list(tmp_path.iterdir())
    begun.note("b", raised.raised, raised.dead)
    dead = hessian.factor(one.calibrated())
    begun.note("c", dead.raised, dead.dead)
    assert Remarks(tmp_path, "exl2").lines() == (
        "1 linears: damping raised up to 100-fold, most for b, whose Hessian could not be factored otherwise",
        "1 linears have input channels that no token uses, up to 2 in c: "
        "their weights were rounded by themselves",
    )
    begun.note("b", whole.raised, whole.dead)
    assert len(Remarks(tmp_path, "exl2").lines()) == 1
    assert Remarks(tmp_path, "gguf").lines() == ()


def test_dead_channels_keep_their_weights_and_the_summary_says_how_many(
    place: Place, llama: Path, ids_file: Path
) -> None:
    def kill(tensor: torch.Tensor) -> None:
        tensor[::8] = 0

    norm = "model.layers.0.post_attention_layernorm.weight"
    model = with_weight(llama, place.directory / "model", norm, kill)
    summary = convert(settings(model, place.out, ids_file, bits=6.0))
    notes = " ".join(summary["outputs"]["exl2"]["notes"])
    assert "2 linears have input channels that no token uses, up to 8 in model.layers.0.mlp" in notes


def flip_exl2(directory: Path) -> None:
    packed = load_file(directory / "output.safetensors")[f"{KEY}.q_weight"]
    packed[0, 0] ^= 1 << 30
    edit_tensors(directory / "output.safetensors", **{f"{KEY}.q_weight".replace(".", "__"): packed})


def swap_exl2(directory: Path) -> None:
    tensors, path = load_file(directory / "output.safetensors"), directory / "output.safetensors"
    pairs = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
    swapped = {
        name.replace(".", "__"): tensors[name.replace(part, pairs[part])]
        for name in tensors
        for part in pairs
        if f"layers.1.mlp.{part}" in name
    }
    edit_tensors(path, **swapped)


def norm_exl2(directory: Path) -> None:
    norm = load_file(directory / "output.safetensors")["model.layers.0.input_layernorm.weight"]
    norm[5] += 1
    edit_tensors(directory / "output.safetensors", **{"model__layers__0__input_layernorm__weight": norm})


def gguf_bytes(path: Path, name: str) -> slice:
    (tensor,) = (each for each in gguf.GGUFReader(path).tensors if each.name == name)
    return slice(int(tensor.data_offset), int(tensor.data_offset + tensor.n_bytes))


def change_gguf(*names: str) -> Callable[[Path], None]:
    """Flips a bit of one tensor, or gives two each other's bytes."""

    def change(directory: Path) -> None:
        (path,) = directory.glob("*.gguf")
        data, places = bytearray(path.read_bytes()), [gguf_bytes(path, name) for name in names]
        if len(places) == 2:
            data[places[0]], data[places[1]] = data[places[1]], data[places[0]]
        else:
            data[places[0].start] ^= 1
        path.write_bytes(data)

    return change


FAULTS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "a bit of a linear": ("exl2", flip_exl2),
    "two linears": ("exl2", swap_exl2),
    "a norm": ("exl2", norm_exl2),
    "a bit of a matrix": ("gguf", change_gguf("blk.1.ffn_up.weight")),
    "two matrices": ("gguf", change_gguf("blk.1.ffn_up.weight", "blk.1.ffn_gate.weight")),
    "a norm of GGUF": ("gguf", change_gguf("output_norm.weight")),
    "the embedding": ("gguf", change_gguf("token_embd.weight")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_between_writing_and_checking_fails_the_job(
    fault: str,
    both: Any,
    tmp_path: Path,
    ids_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kind, change = FAULTS[fault]
    check = f"verify_{kind}"
    real = getattr(verify, check)

    def checked(*given: Any) -> None:
        change(given[1] if kind == "exl2" else given[0][0].parent)
        real(*given)

    monkeypatch.setattr(verify, check, checked)
    out = tmp_path / "out"
    changes = {"formats": (kind,), "bits": 4.5, "measurement": both.measurement, "force_measurement": True}
    config = settings(both.config.in_dir, out, ids_file, **changes)
    with pytest.raises(VerifyError, match="is not what was written"):
        convert(config)
    assert not (out / kind).exists()
    assert not (out / "summary.json").exists()


def test_logits_far_from_the_base_fail_the_job_at_any_bits(
    both: Any, tmp_path: Path, ids_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written is what was meant, and yet no model: only the comparison with the base can see that."""
    scored = divergence._score_part

    def upside_down(base: torch.Tensor, other: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return scored(base, other if other is base else -4 * other, targets)

    monkeypatch.setattr(divergence, "_score_part", upside_down)
    for bits in (4.5, 2.5):
        changes: dict[str, Any] = {"measurement": both.measurement, "force_measurement": True, "bits": bits}
        config = settings(both.config.in_dir, tmp_path / "out", ids_file, **changes)
        with pytest.raises(ExlqError, match="the result is not to be trusted and was not put in place"):
            convert(config)
        assert not (tmp_path / "out" / "exl2").exists()
