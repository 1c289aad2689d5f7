"""`exlq eval` with GGUF files: what it prints and how it ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from exlq.cli import main
from tests.evaluation.conftest import BundledAs


@pytest.fixture
def arguments(tiny_llama: Path, sources_file: Path) -> list[str]:
    return ["--base", str(tiny_llama), "-c", str(sources_file), "--ctx", "64", "--chunks", "2"]


def test_several_files_make_one_table_and_one_list(
    bundled_as: BundledAs,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "900")
    files = [str(bundled_as(kind)) for kind in ("Q4_0", "Q8_0", "Q4_K")]
    assert main(["eval", *files, *arguments, "--runtime", "llama.cpp"]) == 0
    shown = capsys.readouterr().out
    assert main(["eval", *files, *arguments, "--runtime", "llama.cpp", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["model"] for each in found] == files
    assert [each["bytes"] for each in found] == [Path(file).stat().st_size for file in files]
    for each in found:
        row = next(line for line in shown.splitlines() if each["model"] in line)
        assert f"{each['kl_mean']:.6f}" in row
        assert f"{each['bytes']:,}" in row
        assert (" a " in row) == ("Q4" in each["model"])
        assert (each["runtime"], each["weights_only"]) == ("llama.cpp", False)
        assert "2 chunks of 64 tokens" in each["protocol"]


def test_one_file_makes_one_object_and_weights_only_is_said(
    bundled_as: BundledAs, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--runtime", "llama.cpp", "--weights-only", "--json"]
    assert main(["eval", str(bundled_as("Q4_0")), *arguments, *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["weights_only"]
    assert "dequantized" in found["protocol"]
    assert main(["eval", str(bundled_as("Q4_0")), *arguments, "--json"]) == 0
    in_torch = json.loads(capsys.readouterr().out)
    assert in_torch["kl_mean"] == pytest.approx(found["kl_mean"], rel=1e-3)


def test_a_file_that_cannot_be_used_is_one_line_and_code_2(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.gguf").write_text("plain text, long enough to hold a header", encoding="utf-8")
    for flags in ([], ["--weights-only"]):
        assert main(["eval", str(tmp_path / "bad.gguf"), *arguments, *flags]) == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        assert len(shown.err.splitlines()) == 1
