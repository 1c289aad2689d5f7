"""Tiny models, tokens and conversions, made once."""

from __future__ import annotations

import argparse
import inspect
import pathlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from exlq.pipeline.config import ConvertConfig
from tests.conftest import REPOSITORY
from tests.helpers import make_model
from tests.pipeline.helpers import convert, settings, write_ids, write_texts

COMMITTED = REPOSITORY / "measurements" / "tiny-llama.json"
TinyMaker = Callable[[str, bool], Path]


@dataclass(frozen=True)
class Finished:
    """A conversion that was done; not to be changed."""

    config: ConvertConfig
    summary: dict[str, Any]

    @property
    def model(self) -> Path:
        return self.config.out_dir / "exl2"

    @property
    def gguf(self) -> Path:
        return self.config.out_dir / "gguf"

    @property
    def measurement(self) -> Path:
        return self.config.out_dir / "measurement.json"


@pytest.fixture(scope="session")
def llama(tiny: TinyMaker) -> Path:
    return tiny("llama", False)


@pytest.fixture(scope="session")
def ids_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ids(tmp_path_factory.mktemp("calibration") / "ids.parquet")


@pytest.fixture(scope="session")
def finished(llama: Path, ids_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The tiny llama at 6 bits per weight."""
    config = settings(llama, tmp_path_factory.mktemp("finished") / "out", ids_file)
    return Finished(config, convert(config))


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama whose rows are whole blocks of 256 but for those of attn_output."""
    directory = tmp_path_factory.mktemp("wide") / "wide"
    return make_model("llama", directory, tied=False, hidden_size=256, intermediate_size=512)


@pytest.fixture(scope="session")
def both(wide: Path, ids_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The wide llama at 4.5 bits per weight in both formats, which is what is made without --format."""
    out = tmp_path_factory.mktemp("both") / "out"
    config = settings(wide, out, ids_file, bits=4.5, formats=None, measure=None)
    return Finished(config, convert(config))


@pytest.fixture(scope="session")
def sources_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text that every Python brings along."""
    texts = [inspect.getsource(module) for module in (inspect, argparse, pathlib)]
    return write_texts(tmp_path_factory.mktemp("text") / "sources.parquet", texts)


@pytest.fixture(scope="session")
def bundled(tiny_llama: Path, sources_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The bundled model at 4 bits per weight, in files of at most 2 MiB."""
    changes: dict[str, Any] = {"rows": 8, "length": 128, "measurement_rows": 8, "measurement_length": 128}
    if COMMITTED.exists():
        changes |= {"measurement": COMMITTED, "force_measurement": True}
    out = tmp_path_factory.mktemp("bundled") / "out"
    config = settings(tiny_llama, out, sources_file, bits=4.0, shard_mib=2, **changes)
    return Finished(config, convert(config))
