"""The command with GGUF among its formats: what is left out, what is refused, what is only rehearsed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from exlq.cli import main
from exlq.models.model import Model
from tests.helpers import edit_config
from tests.pipeline.helpers import Place, Stored, block_is_read, contents, made_up, settings

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
Refusal = tuple[Callable[[Place], list[str]], tuple[str, ...]]


@pytest.fixture
def place(wide: Path, ids_file: Path, tmp_path: Path) -> Place:
    return Place(tmp_path, wide, ids_file)


def with_target(place: Place, *target: str, formats: str | None = None) -> list[str]:
    """The command with another target, and formats as named; all that can be made where none are."""
    arguments = place.without_target()
    at = arguments.index("--format")
    named = ["--format", formats] if formats else []
    return [*arguments[:at], *arguments[at + 4 :], *named, *target]


def record(place: Place, measure: tuple[str, ...] | None = None) -> str:
    """A made-up measurement of the place's model."""
    config = settings(place.model, place.out, place.ids, formats=None, measure=measure)
    return str(made_up(config, place.directory / "m.json"))


def template(place: Place) -> list[str]:
    path = place.directory / "base.gguf"
    path.write_text("no gguf", encoding="utf-8")
    return with_target(place, "-b", "4.5", "--gguf-template", str(path), formats="gguf")


def unknown_tokenizer(place: Place) -> list[str]:
    model = place.model_copy()
    path = model / "tokenizer.json"
    tokens = json.loads(path.read_text(encoding="utf-8"))
    split = {"type": "Split", "pattern": {"Regex": "[A-Z]{7}"}, "behavior": "Isolated", "invert": False}
    tokens["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, {**BYTES, "use_regex": False}]}
    path.write_text(json.dumps(tokens), encoding="utf-8")
    arguments = with_target(place, "-b", "4.5", formats="gguf")
    arguments[arguments.index("-i") + 1] = str(model)
    return arguments


def file_in_place(place: Place) -> list[str]:
    place.out.mkdir()
    (place.out / "gguf").write_text("mine", encoding="utf-8")
    return with_target(place, "-b", "4.5", formats="gguf")


REFUSED: Mapping[str, Refusal] = {
    "bits below the smallest type": (
        lambda p: with_target(p, "-b", "2.5", formats="gguf"),
        ("-b 2.5", "as GGUF this model reaches 2."),
    ),
    "bits above the largest type": (
        lambda p: with_target(p, "-b", "9", formats="gguf"),
        ("-b 9", "as GGUF this model reaches", "to 8.5"),
    ),
    "bits that no format reaches": (
        lambda p: with_target(p, "-b", "2.0"),
        ("-b 2.0", "no exl2: ", "no gguf: "),
    ),
    "a file too small": (
        lambda p: with_target(p, "--file-size", "100KB", formats="gguf"),
        ("--file-size 100000", "the smallest file of this model has"),
    ),
    "a file too small, whatever the format": (
        lambda p: with_target(p, "--file-size", "100KB"),
        ("the smallest file of this model has",),
    ),
    "no size": (lambda p: with_target(p, "--file-size", "many"), ("many",)),
    "a recipe nobody knows": (lambda p: with_target(p, "--gguf-type", "Q9_K"), ("'Q9_K'", "Q4_K_M")),
    "bits and a size": (
        lambda p: with_target(p, "-b", "4.5", "--file-size", "1MB"),
        ("-b and --file-size exclude one another",),
    ),
    "a size and a recipe": (
        lambda p: with_target(p, "--file-size", "1MB", "--gguf-type", "Q4_0"),
        ("--file-size and --gguf-type exclude one another",),
    ),
    "all three": (
        lambda p: with_target(p, "-b", "4.5", "--file-size", "1MB", "--gguf-type", "Q4_0"),
        ("exclude one another",),
    ),
    "a size for EXL2 alone": (
        lambda p: with_target(p, "--file-size", "1MB", formats="exl2"),
        ("--file-size is a target of GGUF; EXL2 takes -b BITS",),
    ),
    "a recipe for both formats by name": (
        lambda p: with_target(p, "--gguf-type", "Q4_0", formats="exl2,gguf"),
        ("--gguf-type is a target of GGUF",),
    ),
    "a measurement without the format's options": (
        lambda p: with_target(p, "-b", "4.5", "-m", record(p, ("exl2",)), formats="gguf"),
        ("no gguf options of model.layers.0", "without --measure"),
    ),
    "a format that will not have been measured": (
        lambda p: with_target(p, "-b", "4.5", "--measure", "exl2", formats="gguf"),
        ("--measure exl2", "gguf"),
    ),
    "unweighted rounding within bits": (
        lambda p: with_target(p, "-b", "4.5", "--unweighted"),
        ("--unweighted", "--gguf-type"),
    ),
    "a type nobody knows": (
        lambda p: with_target(p, "-b", "4.5", "--tensor-type", "attn_v=Q9_0", formats="gguf"),
        ("--tensor-type attn_v=", "'Q9_0'"),
    ),
    "a pattern that is none": (
        lambda p: with_target(p, "-b", "4.5", "--tensor-type", "attn_(v=Q8_0", formats="gguf"),
        ("attn_(v=Q8_0", "no regular expression"),
    ),
    "no file of types": (
        lambda p: with_target(
            p, "-b", "4.5", "--tensor-type-file", str(p.directory / "none"), formats="gguf"
        ),
        ("--tensor-type-file", "none"),
    ),
    "a tokenizer llama.cpp does not know": (unknown_tokenizer, ("--tokenizer-pre",)),
    "a template that is no GGUF": (template, ("base.gguf",)),
    "a file in the directory's place": (file_in_place, ("out/gguf", "move it away")),
    "a rehearsal without a measurement": (
        lambda p: with_target(p, "-b", "4.5", "--dry-run", formats="gguf"),
        ("--dry-run", "-m FILE", "--gguf-type"),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_in_one_line_before_anything_is_done(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    make, wanted = REFUSED[name]
    arguments = make(place)
    before = contents(place.directory)
    monkeypatch.setattr(Model, "block", block_is_read)
    code = main(arguments)
    shown = capsys.readouterr()
    assert code == 2, shown.err
    (line,) = shown.err.splitlines()
    for part in wanted:
        assert part in line
    assert shown.out == ""
    assert contents(place.directory) == before


def test_a_target_below_ggufs_smallest_type_makes_exl2_alone_and_says_why(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    arguments = with_target(place, "-b", "2.5")
    assert main([*arguments, "-m", record(place)]) == 0
    shown = capsys.readouterr()
    assert "error" not in shown.err
    assert (place.out / "exl2" / "output.safetensors").is_file()
    assert not (place.out / "gguf").exists()
    why = "no gguf: -b 2.5: as GGUF this model reaches 2."
    assert shown.out.count(why) == 2, "in the plan and in the result"
    (note,) = json.loads((place.out / "summary.json").read_text(encoding="utf-8"))["notes"]
    assert note.startswith(why)


def test_a_target_of_gguf_alone_makes_no_exl2_and_says_why(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert main([*with_target(place, "--gguf-type", "Q8_0")]) == 0
    shown = capsys.readouterr()
    assert "no exl2: --gguf-type is a target of GGUF; EXL2 takes -b BITS" in shown.out
    assert [path.name for path in sorted((place.out / "gguf").iterdir())] == [
        "README.md",
        "Wide-1.0M-Q8_0.gguf",
        "Wide-1.0M-Q8_0.types.txt",
    ]
    assert not (place.out / "exl2").exists()


@pytest.mark.parametrize(
    "target", [["-b", "4.5"], ["--file-size", "600KB"], ["--gguf-type", "Q4_K_M"], ["--gguf-type", "15"]]
)
def test_a_rehearsal_prints_every_tensor_and_writes_nothing(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], target: list[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    arguments = [*with_target(place, *target, formats="gguf"), "-m", record(place), "--dry-run"]
    before = contents(place.directory)
    monkeypatch.setattr(Model, "block", block_is_read)
    assert main(arguments) == 0
    shown = capsys.readouterr()
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in shown.out.splitlines() if "│" in line
    ]
    tensors = {row[0]: row[1] for row in rows}
    assert len(tensors) == 22, "21 tensors and the file"
    assert tensors["output_norm.weight"] == "F32"
    assert tensors["blk.1.attn_output.weight"] in ("IQ4_NL", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
    (total,) = (row[2] for row in rows if row[0].startswith("the file"))
    assert 500_000 < int(total.replace(",", "")) <= 700_000
    assert "gguf: " in shown.out
    assert "bits per weight, predicted KL divergence" in shown.out
    assert contents(place.directory) == before
    assert not place.out.exists()


def test_a_tokenizers_name_can_be_given_by_hand(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*unknown_tokenizer(place), "--tokenizer-pre", "gpt-2", "-m", record(place), "--dry-run"]
    assert main([*arguments, "--force-measurement"]) == 0, capsys.readouterr().err


def test_a_context_of_another_length_is_what_the_file_says(place: Place) -> None:
    """What stands in config.json and is no tensor goes into the file as it is."""
    model = place.model_copy()
    edit_config(model, max_position_embeddings=96)
    arguments = with_target(place, "--gguf-type", "F16", formats="gguf")
    arguments[arguments.index("-i") + 1] = str(model)
    assert main(arguments) == 0
    assert Stored.read(place.out / "gguf").fields["llama.context_length"] == 96
