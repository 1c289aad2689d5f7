"""`exlq plan` and what `exlq convert` takes from it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from exlq.cli import main
from exlq.pipeline import job
from exlq.pipeline.config import ConvertConfig
from exlq.sizing.advice import advise
from exlq.sizing.fitting import Room, largest_bits
from exlq.sizing.shapes import read_shape
from tests.pipeline.helpers import settings, write_ids
from tests.sizing.helpers import CONFIGS

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")


@pytest.fixture
def llama_8b(tmp_path: Path) -> Path:
    """A directory with nothing but the config.json of a large model."""
    config = {**CONFIGS["Llama-3.1-8B"][1], "architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return tmp_path


def planned(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert main(["plan", *map(str, arguments), "--gflops", "100", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with suppress(SystemExit):  # argparse's own; the code is checked of the others
        assert main(list(map(str, arguments))) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    return shown.err


def test_it_prints_what_fits_and_what_it_costs(llama_8b: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(llama_8b), "--memory", "8GiB", "--context", "8192", "--gflops", "100"]) == 0
    shown = capsys.readouterr().out
    advice = advise(read_shape(llama_8b), Room(8 << 30, 8192), 1e11)
    for name in ("exl2", "gguf"):
        assert f"-b {advice.bits[name][0]:.2f}: " in shown
    for part in (
        "8.00 GiB (--memory)",
        "Q6_K: ",
        f"--file-size {advice.file_bytes}",
        "131,072",
        "(24.88 GiB)",
    ):
        assert part in shown
    for part in ("quick", "normal", "best", "204,800", "at 100 GFLOP/s", "512 MiB are kept free"):
        assert part in shown


def test_json_has_the_same_for_programs(llama_8b: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, llama_8b, "--memory", "8GiB", "--context", 8192)
    advice = advise(read_shape(llama_8b), Room(8 << 30, 8192), 1e11)
    assert found["memory_bytes"] == 8 << 30
    assert found["largest"]["gguf_file_bytes"] == advice.file_bytes
    assert found["largest"]["gguf_type"]["choice"] == "Q6_K"
    for name, (bits, fit) in advice.bits.items():
        assert found["largest"]["bits"][name]["bits"] == bits
        assert found["largest"]["bits"][name]["total"] == fit.running.total <= 8 << 30
    assert [size["choice"] for size in found["sizes"]] == [row[0].choice for row in advice.table]
    assert list(found["sizes"][0]["total_bytes"]) == ["2048", "8192", "32768", "131072"]
    assert [cost["effort"] for cost in found["conversion"]] == ["quick", "normal", "best"]
    assert found["conversion"][1]["total_s"] == pytest.approx(advice.costs[1].total_s)


def test_a_smaller_cache_leaves_room_for_more_bits(
    llama_8b: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bits = [
        planned(capsys, llama_8b, "--memory", "8GiB", "--cache", cache)["largest"]["bits"]["exl2"]["bits"]
        for cache in ("f16", "q8_0", "q6", "q4_0")
    ]
    assert bits == sorted(bits)
    assert bits[0] < bits[-1]


@pytest.mark.skipif(not hasattr(os, "sysconf"), reason="this system does not tell its memory")
def test_without_memory_it_is_this_machines(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(tiny_llama)]) == 0
    assert "this machine's RAM" in capsys.readouterr().out
    assert planned(capsys, tiny_llama)["memory_bytes"] > 1 << 28


def test_it_loads_neither_torch_nor_transformers(llama_8b: Path) -> None:
    code = (
        "import sys; from exlq.cli import main; main(sys.argv[1:]); "
        "print([name for name in ('torch', 'transformers', 'pyarrow') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, "plan", str(llama_8b), "--memory", "8GiB"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--memory", "2GiB"], "smallest wants"),
        (["--memory", "plenty"], "is no size"),
        (["--memory", "8GiB", "--context", "131073"], "goes from 1 to 131072 tokens"),
        (["--gflops", "0"], "a number above 0 is wanted"),
        (["--cache", "q5"], "invalid choice"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    llama_8b: Path, capsys: pytest.CaptureFixture[str], flags: list[str], told: str
) -> None:
    assert told in refused(capsys, "plan", llama_8b, *flags)


def test_a_directory_without_a_config_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no config.json" in refused(capsys, "plan", tmp_path)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["-b", "auto"], "-b auto wants --memory"),
        (["-b", "4", "--memory", "8GiB"], "--memory 8GiB: it goes with -b auto alone"),
        (["--gguf-type", "Q4_K_M", "--context", "512"], "--context 512: it goes with -b auto alone"),
        (["-b", "auto", "--memory", "8GiB", "--file-size", "3MB"], "exclude one another"),
        (["-b", "auto", "--memory", "8MiB"], "smallest wants"),
        (["-b", "auto", "--memory", "8GiB", "--context", "9999"], "from 1 to 512 tokens"),
        (["-b", "auto", "--memory", "8GiB", "--format", "onnx"], "this model becomes exl2 and gguf"),
        (["-b", "some"], "give one, or auto"),
        (["-b", "4", "--effort", "more"], "invalid choice"),
    ],
)
def test_convert_refuses_what_does_not_go_together(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], told: str
) -> None:
    assert told in refused(capsys, "convert", "-i", tiny_llama, "-o", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_convert_takes_the_bits_that_fit(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[ConvertConfig] = []

    def rehearse(config: ConvertConfig) -> tuple[dict[str, Any], tuple[str, ...]]:
        seen.append(config)
        return {}, ()

    monkeypatch.setattr(job, "rehearse", rehearse)
    flags = ["-b", "auto", "--memory", "528MiB", "--effort", "quick", "--format", "gguf", "--dry-run"]
    assert main(["convert", "-i", str(tiny_llama), "-o", str(tmp_path / "out"), *flags]) == 0
    bits = largest_bits(read_shape(tiny_llama), ("gguf",), Room(528 << 20, 512))
    assert (seen[0].bits, seen[0].effort) == (bits, "quick")
    assert f"-b auto: {bits:.2f} bits per weight" in capsys.readouterr().out


def test_effort_is_in_the_settings_of_a_job(tmp_path: Path) -> None:
    config = settings(tmp_path, tmp_path / "out", write_ids(tmp_path / "ids.parquet"), effort="best")
    assert config.as_json()["effort"] == "best"
