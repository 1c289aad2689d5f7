"""The models that are run: EXL2 and GGUF, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.evaluation.conftest import bundled_as, llama_cpp
from tests.evaluation.helpers import write_llama
from tests.pipeline.conftest import Finished, finished, ids_file, llama

__all__ = ["bundled_as", "finished", "ids_file", "llama", "llama_cpp"]


@pytest.fixture(scope="session")
def exl2(finished: Finished) -> Path:
    return finished.model


@pytest.fixture(scope="session")
def plain_gguf(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model in F32, without a chat template."""
    return write_llama(tiny_llama, tmp_path_factory.mktemp("plain") / "plain.gguf")
