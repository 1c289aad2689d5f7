"""Tests run on one thread each, so that two at a time do not fight over two cores."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

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
