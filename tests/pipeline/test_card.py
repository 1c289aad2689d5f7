"""The model card: figures and provenance, nothing of the machine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub.repocard import metadata_load

from exlq.pipeline.card import CARD
from tests.pipeline.helpers import convert, settings

BASE_CARD = """---
license: apache-2.0
language: en
tags:
- text
base_model: "/somewhere/else"
---
# A base
license: not this one
"""


@pytest.fixture(scope="module")
def made(wide: Path, ids_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("card")
    model = directory / "Wide"
    shutil.copytree(wide, model)
    (model / CARD).write_text(BASE_CARD, encoding="utf-8")
    config = settings(model, directory / "out", ids_file, formats=None, measure=None, permute_mlp=True)
    convert(config)
    return directory / "out"


@pytest.mark.parametrize("kind", ["exl2", "gguf"])
def test_a_card_has_the_figures_of_the_summary_and_the_licence_of_the_base(made: Path, kind: str) -> None:
    card = (made / kind / CARD).read_text(encoding="utf-8")
    result = json.loads((made / "summary.json").read_text(encoding="utf-8"))["outputs"][kind]
    found = result["evaluation"]
    for figure in (
        f"at {result['bpw']:.2f} bits per weight",
        f"| {found['perplexity_base']:.4f} | {found['perplexity']:.4f} |",
        f"{found['kl_mean']:.5f} ± {found['kl_se']:.5f}",
        f"{result['predicted_kl']:.5f} ± {result['predicted_se']:.5f}",
    ):
        assert figure in card
    front = metadata_load(made / kind / CARD) or {}
    assert (front["license"], front["language"], front["base_model"]) == ("apache-2.0", "en", "Wide")
    assert kind in front["tags"]
    assert "channels inside MLPs and attention heads are permuted" in card
    assert not any(str(path).endswith(CARD) for path in result["paths"])


def test_a_card_tells_nothing_of_machine_or_place(made: Path) -> None:
    for kind in ("exl2", "gguf"):
        card = (made / kind / CARD).read_text(encoding="utf-8")
        assert str(made.parent) not in card
        assert "seconds" not in card


def test_a_card_names_the_file_to_run(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "gguf", tmp_path / "gguf")
    (file,) = (tmp_path / "gguf").glob("*.gguf")
    assert f"exlq run {file.name} -p" in (tmp_path / "gguf" / CARD).read_text(encoding="utf-8")
