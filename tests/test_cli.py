"""The command line: what it prints, and how it ends."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from exlq import __version__
from exlq.cli import convert_main, main
from exlq.cli.screen import Screen, Terminal
from exlq.evaluation.run import evaluate
from exlq.models.model import Model
from exlq.pipeline import verify
from tests.helpers import make_model
from tests.pipeline.helpers import Place, block_is_read, contents, convert, settings, write_ids


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("made")
    return make_model("llama", directory / "llama", tied=False), write_ids(directory / "ids.parquet")


@pytest.fixture
def place(made: tuple[Path, Path], tmp_path: Path) -> Place:
    return Place(tmp_path, *made)


@pytest.fixture(scope="module")
def done(made: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished job's directory, not to be changed."""
    out = tmp_path_factory.mktemp("done") / "out"
    convert(settings(made[0], out, made[1]))
    return out


def test_a_command_that_works_prints_its_plan_and_its_result(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert main(place.arguments()) == 0
    shown = capsys.readouterr()
    for part in (
        "Plan",
        "LlamaForCausalLM, 2 blocks",
        "24 rows of 64 tokens, 3 of them held out",
        "reachable",
    ):
        assert part in shown.out
    assert "measuring 3/3" in shown.err
    assert "error" not in shown.err
    summary = json.loads((place.out / "summary.json").read_text(encoding="utf-8"))
    result = summary["outputs"]["exl2"]
    assert f"{result['bpw']:.4f} (asked 6)" in shown.out
    assert f"{result['evaluation']['kl_mean']:.5f}" in shown.out
    assert shown.out.index("Plan") < shown.out.index("Result")
    stages = ["gradients 1/4", "measuring", "quantizing exl2", "verifying exl2"]
    assert sorted(stages, key=shown.err.index) == stages


def test_the_same_command_again_prints_the_summary_and_reads_nothing(
    place: Place, done: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(done, place.out)
    summary = json.loads((place.out / "summary.json").read_text(encoding="utf-8"))
    summary["outputs"]["exl2"]["paths"] = [str(place.out / "exl2")]
    (place.out / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    before = contents(place.out)
    monkeypatch.setattr(Model, "block", block_is_read)
    assert main(place.arguments()) == 0
    shown = capsys.readouterr()
    assert "finished" in shown.out
    assert "-nr" in shown.out
    assert f"{summary['outputs']['exl2']['bpw']:.4f}" in shown.out
    assert contents(place.out) == before
    with pytest.raises(AssertionError, match="block 0 was read"):
        main(place.arguments("-nr", "--debug"))
    with pytest.raises(AssertionError, match="block 0 was read"):
        main(place.arguments("-b", "5.0", "--debug"))


def test_a_measurement_alone_says_where_it_is(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    target = place.out / "m.json"  # the job's directory need not be there yet
    assert main([*place.without_target(), "-om", str(target)]) == 0
    assert f"measurement: {target}" in capsys.readouterr().out.replace("\n", "")
    assert len(json.loads(target.read_text(encoding="utf-8"))["measurement"]) == 16


def test_work_that_fails_ends_with_1_and_one_line(
    place: Place, done: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verify, "ALLOWED_KL", 0.0)
    monkeypatch.setattr(verify, "ALLOWED_RATIO", 0.0)
    assert main(place.arguments("-q", "-m", str(done / "measurement.json"))) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: KL divergence 0.0")
    assert not (place.out / "exl2").exists()


def test_an_interruption_ends_with_130_and_no_traceback(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: Screen, stage: str, done: int, total: int) -> None:
        if (stage, done) == ("measuring", 1):
            raise KeyboardInterrupt

    monkeypatch.setattr(Terminal, "__call__", interrupted)
    assert main(place.arguments()) == 130
    assert capsys.readouterr().err.startswith("error: interrupted")
    assert (place.out / "work" / "measurement.partial.json").exists()


def test_what_the_system_refuses_is_one_line_too(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", "states.bin")

    monkeypatch.setattr("exlq.pipeline.measured.sensitivity.fisher", full)
    assert main(place.arguments()) == 1
    assert capsys.readouterr().err == (
        "error: states.bin: No space left on device; make room, then give the command again: "
        "what is done is kept\n"
    )


def test_an_evaluation_as_json_holds_every_figure(
    place: Place, done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["eval", str(done / "exl2"), "--base", str(place.model), "-c", str(place.ids), "--ctx", "32"]
    assert main([*arguments, "--chunks", "5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (tmp_path / "scratch").mkdir()
    wanted = evaluate(done / "exl2", place.model, place.ids, tmp_path / "scratch", context=32, max_chunks=5)
    assert {name: found[name] for name in vars(wanted)} == vars(wanted)
    assert (found["n_chunks"], found["context"], found["n_tokens"]) == (5, 32, 5 * 15)
    assert (found["model"], found["base"]) == (str(done / "exl2"), str(place.model))
    assert "5 chunks of 32 tokens" in found["protocol"]
    assert 0 < found["kl_median"] < found["kl_p99"] < 0.1


def test_an_evaluation_as_a_table_names_its_protocol_and_noise(
    place: Place, done: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["eval", str(done / "exl2"), "--base", str(place.model), "-c", str(place.ids)]
    assert main([*arguments, "--chunks", "2"]) == 0
    shown = capsys.readouterr().out
    for part in ("perplexity", "KL divergence, 99 %", "same best token", "noise floor", "llama-perplexity"):
        assert part in shown
    assert "2 chunks of 128" in " ".join(shown.replace("│", " ").split())


def test_an_evaluation_that_cannot_work_is_one_line(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["eval", str(place.directory / "none"), "--base", str(place.model), "-c", str(place.ids)]
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.splitlines()) == 1
    assert "no such directory" in shown.err


def test_threads_are_those_asked_for(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    main(place.arguments("--threads", "3", "-b", "2.0"))
    assert asked == [3]


def test_it_tells_its_version_and_the_script_is_the_convert_command(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"exlq {__version__}\n"
    monkeypatch.setattr("sys.argv", ["convert.py", *place.arguments("-b", "2.0")[1:]])
    assert convert_main() == 2
    assert "reaches" in capsys.readouterr().err
