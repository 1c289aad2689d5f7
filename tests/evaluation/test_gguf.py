"""GGUF files evaluated: by torch, by llama.cpp, by llama.cpp with their weights dequantized."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from exlq.errors import CalibrationError, ConfigError, ModelError
from exlq.evaluation.llamacpp import quantize_chunk
from exlq.evaluation.run import Settings, evaluate_all, weight_bytes
from exlq.names import LLAMA_CPP
from tests.evaluation.conftest import BundledAs
from tests.evaluation.helpers import by_packer, write_llama

IN_TORCH = Settings(context=64, max_chunks=4)
IN_LLAMA_CPP = replace(IN_TORCH, runtime=LLAMA_CPP)
WEIGHTS = replace(IN_LLAMA_CPP, weights_only=True)


def test_f32_weights_have_one_perplexity_whatever_runs_them(
    bundled_as: BundledAs, tiny_llama: Path, sources_file: Path, tmp_path: Path
) -> None:
    (done,) = evaluate_all([bundled_as("F32")], tiny_llama, sources_file, tmp_path, IN_LLAMA_CPP)
    found = done.found
    assert found.n_tokens == 4 * 31
    assert found.perplexity == pytest.approx(found.perplexity_base, rel=1e-5)
    assert abs(found.kl_mean) < 1e-7
    assert found.top1_agreement == 1
    assert found.noise_floor < 1e-6
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_both_runtimes_see_the_same_loss_but_for_quantized_activations(
    bundled_as: BundledAs, tiny_llama: Path, sources_file: Path, tmp_path: Path, kind: str
) -> None:
    found = [
        evaluate_all([bundled_as(kind)], tiny_llama, sources_file, tmp_path, settings)[0].found
        for settings in (IN_TORCH, WEIGHTS, IN_LLAMA_CPP)
    ]
    in_torch, weights, kernels = found
    assert in_torch.kl_mean > 1e-6
    assert weights.kl_mean == pytest.approx(in_torch.kl_mean, rel=1e-3, abs=1e-8)
    assert weights.perplexity == pytest.approx(in_torch.perplexity, rel=1e-5)
    assert weights.kl_mean != kernels.kl_mean
    assert kernels.kl_mean == pytest.approx(in_torch.kl_mean, rel=0.1, abs=1e-3)


def test_a_base_in_gguf_gives_what_its_directory_gives(
    bundled_as: BundledAs, tiny_llama: Path, sources_file: Path, tmp_path: Path
) -> None:
    by_directory, by_file = (
        evaluate_all([bundled_as("Q4_0")], base, sources_file, tmp_path, IN_LLAMA_CPP)[0].found
        for base in (tiny_llama, bundled_as("F32"))
    )
    assert by_file.n_tokens == by_directory.n_tokens
    assert by_file.perplexity_base == pytest.approx(by_directory.perplexity_base, rel=1e-5)
    assert by_file.kl_mean == pytest.approx(by_directory.kl_mean, rel=1e-4)
    assert 0 < by_file.noise_floor < 1e-6


def test_several_models_share_a_base_and_each_gets_what_it_would_get_alone(
    bundled_as: BundledAs, tiny_llama: Path, sources_file: Path, tmp_path: Path
) -> None:
    models = [bundled_as("Q4_0"), tiny_llama, bundled_as("Q4_K")]
    done = evaluate_all(models, tiny_llama, sources_file, tmp_path, IN_LLAMA_CPP)
    assert [evaluation.model for evaluation in done] == models
    assert done[1].found.kl_mean == 0
    for model, evaluation in zip(models, done, strict=True):
        (alone,) = evaluate_all([model], tiny_llama, sources_file, tmp_path, IN_LLAMA_CPP)
        assert alone == evaluation
    size = {evaluation.model.name: evaluation.n_bytes for evaluation in done}
    assert size["Q4_0.gguf"] == bundled_as("Q4_0").stat().st_size == size["Q4_K.gguf"]
    assert size["tiny-llama"] == (tiny_llama / "model.safetensors").stat().st_size


def test_dequantized_copies_of_several_models_are_not_mixed_up_nor_left(
    bundled_as: BundledAs, tiny_llama: Path, sources_file: Path, tmp_path: Path
) -> None:
    models = [bundled_as("Q8_0"), bundled_as("Q4_0")]
    fine, coarse = evaluate_all(models, tiny_llama, sources_file, tmp_path, WEIGHTS)
    assert fine.found.kl_mean < 0.1 * coarse.found.kl_mean
    assert not list(tmp_path.iterdir())


def split(tiny_llama: Path, directory: Path) -> Path:
    write_llama(tiny_llama, directory / "m.gguf", by_packer("Q8_0", quantize_chunk), split_max_tensors=9)
    return min(directory.glob("m-*.gguf"))


def test_a_split_file_is_evaluated_whole(
    bundled_as: BundledAs, tiny_llama: Path, sources_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "scratch").mkdir()
    first = split(tiny_llama, tmp_path)
    assert weight_bytes(first) == sum(path.stat().st_size for path in tmp_path.glob("*.gguf"))
    for settings in (IN_TORCH, IN_LLAMA_CPP, WEIGHTS):
        parts, whole = evaluate_all(
            [first, bundled_as("Q8_0")], tiny_llama, sources_file, tmp_path / "scratch", settings
        )
        assert parts.found == whole.found


def test_token_rows_serve_a_gguf_base_too(bundled_as: BundledAs, tmp_path: Path) -> None:
    path = tmp_path / "ids.parquet"
    pq.write_table(pa.table({"input_ids": [list(range(4, 100)), list(range(100, 300))]}), path)
    settings = replace(IN_LLAMA_CPP, context=64)
    (done,) = evaluate_all([bundled_as("Q8_0")], bundled_as("F32"), path, tmp_path, settings)
    assert done.found.n_chunks == 297 // 64


def test_what_cannot_be_evaluated_is_refused_before_any_work(
    bundled_as: BundledAs, tiny_llama: Path, llama: Path, sources_file: Path, tmp_path: Path
) -> None:
    def refused(model: Path, base: Path, settings: Settings, why: str, text: Path = sources_file) -> None:
        with pytest.raises((ModelError, ConfigError, CalibrationError), match=why) as caught:
            evaluate_all([model], base, text, tmp_path, settings)
        assert "\n" not in str(caught.value)

    file = bundled_as("Q8_0")
    none, broken = tmp_path / "none.gguf", tmp_path / "broken.gguf"
    broken.write_bytes(file.read_bytes()[:9000])
    for settings in (IN_TORCH, IN_LLAMA_CPP):
        refused(none, tiny_llama, settings, "no such file")
        refused(broken, tiny_llama, settings, "broken.gguf")
        refused(file, llama, settings, "shape|2048 tokens")
    odd = tmp_path / "odd.gguf"
    writer = gguf.GGUFWriter(odd, "llama")
    n_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q8_K][1]
    writer.add_tensor(
        "odd.weight", np.zeros((2, n_bytes), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_K
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(odd, tiny_llama, WEIGHTS, "odd.weight is of type Q8_K.*leave out --weights-only")
    refused(file, file, IN_TORCH, "torch wants the model's directory")
    chats = tmp_path / "chat.parquet"
    pq.write_table(pa.table({"messages": [[{"role": "user", "content": "hello"}]]}), chats)
    refused(file, file, IN_LLAMA_CPP, "a chat template needs a model directory", chats)
    short = tmp_path / "short.parquet"
    pq.write_table(pa.table({"text": ["a few words"]}), short)
    refused(file, file, IN_LLAMA_CPP, "128 are needed", short)


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"--weights-only with --runtime torch"):
        Settings(weights_only=True)
    with pytest.raises(ConfigError, match=r"--runtime onnx: one of torch, llama.cpp"):
        Settings(runtime="onnx")


def test_the_gguf_package_reads_the_bundled_file_as_it_was_meant(bundled_as: BundledAs) -> None:
    kinds = {tensor.tensor_type for tensor in gguf.GGUFReader(bundled_as("Q4_K")).tensors}
    assert kinds == {gguf.GGMLQuantizationType.Q4_K, gguf.GGMLQuantizationType.F32}
