"""`exlq solve` as a person and as a program sees it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from exlq import measurement
from exlq.cli import main
from exlq.recipes import stored
from tests.conftest import REPOSITORY
from tests.recipes.helpers import record

RECORD = REPOSITORY / "measurements" / "tiny-llama.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("solve") / "measurement.json"
    measurement.save(record(), path)
    return str(path)


def solved(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["solve", *arguments, "--json"]) == 0
    return dict(json.loads(capsys.readouterr().out))


def test_several_targets_make_one_table(made: str, capsys: pytest.CaptureFixture[str]) -> None:
    targets = ["-b", "3.9", "--file-size", "90KB", "--max-kl", "0.01"]
    assert main(["solve", made, *targets]) == 0
    shown = capsys.readouterr().out
    for words in ("-b 3.9", "90000", "0.01", "exl2", "gguf", "predicted KL"):
        assert words in shown
    assert [tuple(answer["target"]) for answer in solved(capsys, made, *targets)["answers"]] == [
        ("-b",),
        ("-b",),
        ("--file-size",),
        ("--file-size",),
        ("--max-kl",),
        ("--max-kl",),
    ]


def test_a_format_that_cannot_meet_a_target_is_left_out_with_a_line(
    made: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["solve", made, "-b", "7"]) == 0
    assert "no exl2: -b 7: as exl2" in capsys.readouterr().out
    assert main(["solve", made, "-b", "7", "--format", "exl2"]) == 2
    assert capsys.readouterr().err.startswith("error: -b 7: as exl2 ")


def test_two_budgets_name_the_flag_of_llama_cpp(made: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["solve", made, "--gpu-bytes", "30KB", "--cpu-bytes", "40KB"]) == 0
    assert "--n-gpu-layers " in capsys.readouterr().out
    split = solved(capsys, made, "--gpu-bytes", "30KB", "--cpu-bytes", "40KB")["answers"][0]["split"]
    assert split["gpu_bytes"] <= 30_000
    assert split["cpu_bytes"] <= 40_000


def test_the_frontier_is_whole_in_json_and_thinned_in_the_table(
    made: str, capsys: pytest.CaptureFixture[str]
) -> None:
    frontier = solved(capsys, made, "--frontier")["frontier"]
    assert set(frontier) == {"exl2", "gguf"}
    kls = [point["predicted_kl"] for point in frontier["gguf"]]
    assert kls == sorted(kls, reverse=True)
    assert main(["solve", made, "--frontier", "--limit", "4", "--format", "gguf"]) == 0
    assert f"of {len(kls)} steps" in capsys.readouterr().out


def test_a_recipe_is_written_for_one_target(
    made: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.json"
    assert main(["solve", made, "-b", "3.9", "-o", str(path), "--pin", "v_proj=Q2_K"]) == 0
    recipe = stored.load(path)
    assert recipe.target == {"-b": 3.9}
    assert recipe.outputs["gguf"].options["model.layers.1.self_attn.v_proj"] == "Q2_K"
    path.unlink()
    assert main(["solve", made, "-b", "3.9", "-b", "4", "-o", str(path)]) == 2
    assert not path.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no target: give -b BITS"),
        (["--gpu-bytes", "1GB"], "--gpu-bytes and --cpu-bytes go together"),
        (["--n-gpu-layers", "3"], "--n-gpu-layers goes with"),
        (["--gpu-bytes", "1", "--cpu-bytes", "1", "--format", "exl2"], "are for GGUF"),
        (["--file-size", "12 parsecs"], "is no size"),
        (["--file-size", "1KB"], "the smallest exl2 of this model has"),
        (["-b", "4", "--pin", "nothing"], "is not REGEX=OPTION"),
        (["-b", "4", "--types", "IQ1_S"], "--types: IQ1_S is not among the measured ones"),
        (["-b", "4", "--format", "awq"], "--format awq"),
        (["-b", "4", "-hb", "7"], "-hb 7"),
        (["--max-kl", "0"], "above 0"),
    ],
)
def test_what_cannot_be_is_one_line(
    made: str, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["solve", made, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert words in error
    assert error.count("\n") == 1


def test_a_measurement_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["solve", "nowhere.json", "-b", "4"]) == 2
    assert "nowhere.json cannot be read" in capsys.readouterr().err


def test_the_bundled_measurement_answers_within_a_second_and_without_torch() -> None:
    code = (
        "import sys; from exlq.cli import main; "
        f"code = main(['solve', {str(RECORD)!r}, '-b', '4.2', '--max-kl', '0.01', '--frontier']); "
        "sys.exit(code or ('torch' in sys.modules) or ('transformers' in sys.modules))"
    )
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    taken = time.perf_counter() - begin
    assert done.returncode == 0, done.stderr
    assert taken < 3, "0.4 s on an idle machine"
