"""`exlq quantize`: its arguments, what it prints, and how it ends."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch

from exlq.cli import main
from tests.pipeline.helpers import contents
from tests.pipeline.test_requantize import SHAPES, matrices, random_tensors, types_of, write, write_imatrix


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "model-F32.gguf"
    write(path, random_tensors())
    return path


def quantize(*arguments: object) -> int:
    return main(["quantize", *map(str, arguments), "--search", "fast"])


def test_the_output_and_its_size_are_printed(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_imatrix(tmp_path / "im.dat", matrices(SHAPES) | {"output.weight": (40, 256)})
    before = contents(tmp_path)
    assert quantize("--imatrix", tmp_path / "im.dat", source, tmp_path / "out.gguf", "q4_k_m") == 0
    shown = capsys.readouterr()
    size = (tmp_path / "out.gguf").stat().st_size
    n_weights = sum(tensor.numel() for tensor in random_tensors().values())
    assert "error" not in shown.err
    assert "writing 7/7" in shown.err
    assert f"file: {tmp_path / 'out.gguf'}" in shown.out
    assert f"{8 * size / n_weights:.4f} bits per weight" in shown.out
    assert contents(tmp_path).keys() == before.keys() | {"out.gguf"}
    assert types_of(tmp_path / "out.gguf")["output.weight"] == "Q6_K"


@pytest.mark.parametrize(
    ("kind", "name"),
    [("Q4_K", "model-Q4_K_M.gguf"), ("15", "model-Q4_K_M.gguf"), ("copy", "model-COPY.gguf")],
)
def test_the_default_output_has_the_inputs_name_with_the_type(
    kind: str, name: str, source: Path, tmp_path: Path
) -> None:
    assert quantize(source, kind) == 0
    assert contents(tmp_path).keys() == {source.name, name}


def test_threads_may_stand_at_the_end_as_in_llama_quantize(source: Path, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    try:
        assert quantize(source, "Q4_0", "2") == 0
        assert torch.get_num_threads() == 2
        assert quantize(source, tmp_path / "out.gguf", "2", "1") == 0  # 2 is Q4_0
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "model-Q4_0.gguf").read_bytes()


def test_a_dry_run_prints_what_would_be_and_writes_nothing(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    before = contents(tmp_path)
    assert quantize(source, "Q4_K_M", "--dry-run", "--keep-split") == 0
    shown = capsys.readouterr().out
    assert contents(tmp_path) == before
    assert quantize(source, "Q4_K_M", "--keep-split") == 0
    made = tmp_path / "model-Q4_K_M.gguf"
    assert f"{made.stat().st_size:,}" in shown
    for tensor in gguf.GGUFReader(made).tensors:
        line = next(line for line in shown.splitlines() if f" {tensor.name} " in line)
        assert f" {tensor.tensor_type.name} " in line
        assert f" {tensor.n_bytes:,} " in line


def test_types_by_hand_come_from_flags_and_a_file(source: Path, tmp_path: Path) -> None:
    (tmp_path / "types.txt").write_text("ffn_down=q5_0\nattn_v=q6_k", encoding="utf-8")
    flags = ["--tensor-type", "attn_v=q3_k", "--tensor-type-file", tmp_path / "types.txt", "--pure"]
    assert quantize(source, tmp_path / "out.gguf", "Q4_0", *flags) == 0
    types = types_of(tmp_path / "out.gguf")
    assert types["blk.0.attn_v.weight"] == "Q3_K"
    assert types["blk.0.ffn_down_exps.weight"] == "Q5_0"
    assert types["token_embd.weight"] == "Q4_0"


def test_a_split_output_is_named_without_the_number_of_a_shard(source: Path, tmp_path: Path) -> None:
    assert quantize(source, tmp_path / "s-00001-of-00009.gguf", "COPY", "--split-size", "100KB") == 0
    names = sorted(path.name for path in tmp_path.glob("s-*"))
    assert names == [f"s-{i:05d}-of-{len(names):05d}.gguf" for i in range(1, len(names) + 1)]
    assert len(names) > 1
    assert quantize(tmp_path / names[0], "Q8_0") == 0
    assert (tmp_path / "s-Q8_0.gguf").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "are wanted"),
        (["out.gguf"], "'out.gguf' is no GGUF type"),
        (["out.gguf", "Q9"], "'Q9' is no GGUF type"),
        (["Q4_0", "none"], "'none' threads"),
        (["out.gguf", "Q4_0", "0"], "'0' threads"),
        (["out.gguf", "Q4_0", "1", "1"], "are wanted"),
        (["Q2_K_S"], "--imatrix FILE"),
        (["Q4_0", "--tensor-type", "attn_v"], "REGEX=TYPE"),
        (["Q4_0", "--split-size", "much"], "is no size"),
    ],
)
def test_what_cannot_be_understood_ends_with_two_and_one_line(
    arguments: list[str], message: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(tmp_path)
    assert quantize(source, *arguments) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.err.count("\n") == 1
    assert contents(tmp_path) == before


def test_a_broken_input_ends_with_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = random_tensors()
    tensors["output.weight"][1, 1] = float("nan")
    write(tmp_path / "nan.gguf", tensors)
    assert quantize(tmp_path / "nan.gguf", "Q4_0") == 2
    assert "output.weight" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["nan.gguf"]
    assert quantize(tmp_path / "absent.gguf", "Q4_0") == 2
