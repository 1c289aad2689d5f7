"""Tiny models and tokens, as the pipeline's tests have them, and the bundled model as GGUF files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from exlq.evaluation import llamacpp
from tests.evaluation.helpers import by_packer, write_llama
from tests.pipeline.conftest import finished, ids_file, llama, sources_file

__all__ = ["finished", "ids_file", "llama", "sources_file"]

BundledAs = Callable[[str], Path]


@pytest.fixture(scope="session")
def llama_cpp() -> None:
    """Skips where llama.cpp is not installed."""
    if not llamacpp.available():
        pytest.skip("llama.cpp is not installed (exlq[eval])")


@pytest.fixture(scope="session")
def bundled_as(llama_cpp: None, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> BundledAs:
    """Type → the bundled model with every matrix in it, by the stock quantizer; not to be changed."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            path = tmp_path_factory.mktemp("gguf") / f"{kind}.gguf"
            made[kind] = write_llama(tiny_llama, path, by_packer(kind, llamacpp.quantize_chunk))
        return made[kind]

    return make
