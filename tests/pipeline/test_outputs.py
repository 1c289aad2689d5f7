"""Which formats a job writes, and why not the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from exlq.errors import ConfigError, TargetError
from exlq.formats.codecs import CODECS
from exlq.models.model import Model
from exlq.pipeline.outputs import OUTPUTS, make_outputs
from exlq.pipeline.plan import Plan, make_plan
from tests.pipeline.conftest import TinyMaker
from tests.pipeline.helpers import block_is_read, settings


@pytest.fixture(autouse=True)
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Model, "block", block_is_read)


def plan(model: Path, ids: Path, out: Path, **changes: Any) -> Plan:
    return make_plan(settings(model, out, ids, **{"formats": None, "measure": None, **changes}))


def test_every_format_that_is_known_can_be_written() -> None:
    assert OUTPUTS.keys() == CODECS.keys()


@pytest.mark.parametrize(
    ("changes", "made", "notes"),
    [
        ({"bits": 6.0}, ["exl2", "gguf"], []),
        ({"bits": 6.0, "formats": ("gguf",)}, ["gguf"], []),
        ({"bits": 4.0}, ["exl2"], ["no gguf: -b 4.0: as GGUF this model reaches 4.5"]),
        ({"bits": None, "file_size": 80_000}, ["gguf"], ["no exl2: --file-size is a target of GGUF"]),
        ({"bits": 6.0, "measure": ("exl2",)}, ["exl2"], ["no gguf: --measure exl2"]),
        ({"bits": 6.0, "measure": ("gguf",)}, ["gguf"], ["no exl2: --measure gguf"]),
    ],
)
def test_what_was_not_asked_for_by_name_is_left_out_with_one_line_why(
    llama: Path, ids_file: Path, tmp_path: Path, changes: dict[str, Any], made: list[str], notes: list[str]
) -> None:
    outputs, said = make_outputs(plan(llama, ids_file, tmp_path / "out", **changes))
    assert [output.name for output in outputs] == made
    assert len(said) == len(notes)
    for line, wanted in zip(said, notes, strict=True):
        assert line.startswith(wanted)
        assert "\n" not in line


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"bits": 4.0, "formats": ("exl2", "gguf")}, TargetError, "as GGUF this model reaches 4.5"),
        ({"bits": 2.0}, TargetError, r"no exl2: .* reaches 2\..*; no gguf: .* reaches 4\.5"),
        (
            {"formats": ("gguf",), "measure": ("exl2",)},
            ConfigError,
            "--measure exl2 tries no options of gguf",
        ),
    ],
)
def test_what_was_asked_for_by_name_or_would_leave_nothing_is_refused(
    llama: Path, ids_file: Path, tmp_path: Path, changes: dict[str, Any], error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        make_outputs(plan(llama, ids_file, tmp_path / "out", **changes))


def test_a_family_that_exllamav2_does_not_know_is_made_as_gguf(
    tiny: TinyMaker, ids_file: Path, tmp_path: Path
) -> None:
    outputs, (note,) = make_outputs(plan(tiny("gemma3", True), ids_file, tmp_path / "out"))
    assert [output.name for output in outputs] == ["gguf"]
    assert note.startswith("no exl2: ExLlamaV2 0.3.2 does not know Gemma3ForCausalLM")


def test_a_family_that_is_not_exl2s_measures_what_it_can(
    tiny: TinyMaker, ids_file: Path, tmp_path: Path
) -> None:
    """Options of both are measured where the shape admits them, whatever is written."""
    found = plan(tiny("gemma3", True), ids_file, tmp_path / "out", formats=("gguf",))
    names = {codec.name for spec in found.linears for codec, _ in found.tried(spec)}
    assert names == {"exl2", "gguf"}
