"""The package from Python: what it exports, and that it does what the commands do."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

import exlq
from exlq import ConvertConfig, Settings, convert, evaluate, load_measurement, measure, open_exl2, open_gguf
from exlq.errors import ConfigError, FormatError, ModelError
from exlq.pipeline.progress import silent
from tests.helpers import make_model
from tests.pipeline.helpers import SMALL, write_ids

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ConvertConfig:
    directory = tmp_path_factory.mktemp("api")
    model = make_model("llama", directory / "model", tied=False, hidden_size=256, intermediate_size=512)
    text = write_ids(directory / "ids.parquet")
    return ConvertConfig(model, directory / "out", calibration=text, bits=5.0, **SMALL)


def test_every_export_is_found_and_typed() -> None:
    tree = ast.parse((REPOSITORY / "exlq" / "__init__.pyi").read_text(encoding="utf-8"))
    typed = {
        alias.asname: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == exlq.EXPORTS
    for name in exlq.EXPORTS:
        assert getattr(exlq, name).__name__ == name
        assert name in dir(exlq)
    with pytest.raises(AttributeError, match="no attribute 'magic'"):
        exlq.magic  # type: ignore[attr-defined]  # noqa: B018


def test_the_settings_load_no_torch() -> None:
    code = "import sys; from exlq import ConvertConfig; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.stdout.strip() == "False", done.stderr


def test_a_model_is_measured_converted_compared_and_read(config: ConvertConfig) -> None:
    steps: list[tuple[str, int, int]] = []
    record = measure(config, lambda *step: steps.append(step))
    assert {stage for stage, _, _ in steps} == {"gradients", "measuring"}
    assert load_measurement(config.out_dir) == record
    summary = convert(replace(config, measurement=config.out_dir / "measurement.json"))
    exl2, gguf_file = (Path(summary["outputs"][kind]["paths"][0]) for kind in ("exl2", "gguf"))
    assert convert(replace(config, measurement=config.out_dir / "measurement.json")) == summary
    assert config.calibration is not None
    found = evaluate([exl2, gguf_file], config.in_dir, config.calibration, Settings(context=32, max_chunks=4))
    assert [each.model for each in found] == [exl2, gguf_file]
    for each in found:
        assert 0 < each.found.kl_mean < 0.1
    weights = open_exl2(exl2)
    assert weights.shape("model.layers.0.mlp.up_proj.weight") == (512, 256)
    assert weights.read("model.layers.0.mlp.up_proj.weight").isfinite().all()


def test_a_gguf_file_reads_as_the_gguf_package_reads_it(config: ConvertConfig) -> None:
    only = replace(config, bits=None, gguf_type="Q4_K_M", formats=("gguf",), out_dir=config.out_dir / "q4")
    path = Path(convert(only, silent)["outputs"]["gguf"]["paths"][0])
    reader = gguf.GGUFReader(path)
    with open_gguf(path) as file:
        assert list(file.keys()) == [tensor.name for tensor in reader.tensors]
        for tensor in reader.tensors:
            wanted = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            found = file.read(tensor.name)
            assert file.shape(tensor.name) == tuple(found.shape)
            assert np.array_equal(found.numpy(), wanted.reshape(found.shape)), tensor.name
        name = "blk.0.ffn_up.weight"
        assert torch.equal(file.read(name, slice(3, 9)), file.read(name)[3:9])
        assert file.dtype(name) == torch.float32
        with pytest.raises(ModelError, match="no tensor absent"):
            file.read("absent")


def test_what_cannot_be_used_is_one_line(config: ConvertConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"measure\(\)"):
        convert(replace(config, output_measurement=tmp_path / "m.json"))
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    with pytest.raises(FormatError, match="not a whole GGUF file"):
        open_gguf(tmp_path / "broken.gguf")
