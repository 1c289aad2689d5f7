"""Tests run on one thread each, so that two at a time do not fight over two cores."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.helpers import make_model

TinyMaker = Callable[[str, bool], Path]

os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = REPOSITORY.parent / "shared"


@pytest.fixture(scope="session")
def tiny_llama() -> Path:
    """The bundled model: 4 blocks of 256/768, 2048 tokens, really trained."""
    return REPOSITORY / "tests" / "assets" / "tiny-llama"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference material beside the repository, where there is one."""
    if not SHARED.is_dir():
        pytest.skip("the reference material beside the repository is absent")
    return SHARED


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyMaker:
    """(family, tied) → the directory of a tiny model, not to be changed."""
    made: dict[tuple[str, bool], Path] = {}

    def make(family: str, tied: bool) -> Path:
        if (family, tied) not in made:
            made[family, tied] = make_model(family, tmp_path_factory.mktemp(family), tied=tied)
        return made[family, tied]

    return make
