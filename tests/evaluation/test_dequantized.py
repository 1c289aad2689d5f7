"""F32 copies of GGUF files, read by the gguf package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from exlq.errors import FormatError
from exlq.evaluation.dequantized import dequantized_copy
from exlq.evaluation.llamacpp import quantize_chunk

pytestmark = pytest.mark.usefixtures("llama_cpp")

KINDS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_1", "Q2_K", "Q4_K", "Q6_K", "IQ4_XS", "TQ2_0", "MXFP4"]


def written(path: Path, tensors: dict[str, tuple[Any, Any]], **writer_settings: Any) -> Path:
    writer = gguf.GGUFWriter(path, "llama", **writer_settings)
    writer.add_name("a model")
    writer.add_array("some.array", [3, 1, 2])
    writer.add_float32("some.float", 0.1)
    writer.add_custom_alignment(64)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def mixed() -> dict[str, tuple[Any, Any]]:
    """One matrix of each type, one stack of experts, a norm, and integers that are no weights."""
    weight = torch.randn(5, 256, generator=torch.Generator().manual_seed(1))
    tensors = {}
    for name in KINDS:
        kind = gguf.GGMLQuantizationType[name]
        tensors[f"{name}.weight"] = (quantize_chunk(name, weight).numpy(), kind)
    experts = quantize_chunk("Q4_K", weight.repeat(3, 1)).reshape(3, 5, -1)
    tensors["experts.weight"] = (experts.numpy(), gguf.GGMLQuantizationType.Q4_K)
    tensors["norm.weight"] = (np.arange(7, dtype=np.float32), None)
    tensors["numbers"] = (np.arange(7, dtype=np.int32), None)
    return tensors


def check(copy: Path, tensors: dict[str, tuple[Any, Any]]) -> gguf.GGUFReader:
    reader = gguf.GGUFReader(copy)
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert list(found) == list(tensors)
    for name, (data, kind) in tensors.items():
        wanted = data if kind is None else gguf.quants.dequantize(data, kind)
        assert found[name].data.dtype == wanted.dtype
        assert np.array_equal(found[name].data, wanted), name
    return reader


def test_every_weight_is_what_the_gguf_package_dequantizes_and_the_rest_is_kept(tmp_path: Path) -> None:
    tensors = mixed()
    path = written(tmp_path / "in.gguf", tensors)
    reader = check(dequantized_copy(path, tmp_path / "out.gguf"), tensors)
    fields = {name: field.contents() for name, field in reader.fields.items() if "GGUF." not in name}
    fields.pop("general.alignment", None)  # a copy may choose its own
    assert fields == {
        "general.architecture": "llama",
        "general.name": "a model",
        "some.array": [3, 1, 2],
        "some.float": pytest.approx(0.1),
    }
    assert all(tensor.data_offset % reader.alignment == 0 for tensor in reader.tensors)


def test_a_split_file_becomes_one(tmp_path: Path) -> None:
    tensors = mixed()
    written(tmp_path / "in.gguf", tensors, split_max_tensors=4)
    first = min(tmp_path.glob("in-*.gguf"))
    reader = check(dequantized_copy(first, tmp_path / "out.gguf"), tensors)
    assert not [name for name in reader.fields if name.startswith("split.")]


def test_a_type_nobody_can_read_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType.Q8_K
    n_bytes = gguf.GGML_QUANT_SIZES[kind][1]
    path = written(tmp_path / "in.gguf", {"odd.weight": (np.zeros((2, n_bytes), np.uint8), kind)})
    with pytest.raises(FormatError, match=r"odd.weight is of type Q8_K, .* leave out --weights-only"):
        dequantized_copy(path, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()
