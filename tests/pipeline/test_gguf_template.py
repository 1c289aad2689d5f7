"""A conversion after the pattern of a float GGUF: its metadata, our weights."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from exlq.errors import ModelError
from exlq.formats.gguf.reader import GgufFile
from tests.helpers import make_model
from tests.pipeline.helpers import Stored, convert, settings


def test_metadata_is_the_template_s_and_the_blocks_are_those_of_a_plain_conversion(
    wide: Path, ids_file: Path, tmp_path: Path
) -> None:
    plain = settings(wide, tmp_path / "base", ids_file, bits=None, gguf_type="F16", formats=("gguf",))
    template = Path(convert(plain)["outputs"]["gguf"]["paths"][0])
    wanted = {"bits": None, "gguf_type": "Q4_K_M", "formats": ("gguf",)}
    convert(settings(wide, tmp_path / "own", ids_file, **wanted))
    made = convert(settings(wide, tmp_path / "out", ids_file, **wanted, gguf_template=template))
    path = Path(made["outputs"]["gguf"]["paths"][0])
    with GgufFile(template) as pattern, GgufFile(path) as file:
        for key, entry in pattern.metadata.items():
            if not key.startswith(("exlq.", "general.file_type")):
                assert file.metadata[key].value == entry.value, key
    own, stored = (Stored.read(tmp_path / name / "gguf") for name in ("own", "out"))
    assert stored.types == own.types
    for name, tensor in stored.tensors.items():
        assert np.array_equal(tensor.data, own.tensors[name].data), name
    assert gguf.GGUFReader(path).fields["general.architecture"].contents() == "llama"


def test_a_template_of_another_model_is_refused_before_anything_is_written(
    wide: Path, ids_file: Path, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    other = make_model("llama", tmp_path / "other", tied=False, seed=7, **sizes)
    config = settings(other, tmp_path / "base", ids_file, bits=None, gguf_type="F32", formats=("gguf",))
    template = Path(convert(config)["outputs"]["gguf"]["paths"][0])
    with pytest.raises(ModelError, match="template"):
        convert(
            settings(
                wide, tmp_path / "out", ids_file, formats=("gguf",), measure=None, gguf_template=template
            )
        )
    assert not (tmp_path / "out").exists()
