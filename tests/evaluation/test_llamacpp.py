"""llama.cpp against transformers, against the gguf package, and when something is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from exlq.errors import ConfigError, FormatError, ModelError
from exlq.evaluation import llamacpp, llamacpp_api
from exlq.evaluation.llamacpp import Runtime, quantize_chunk
from tests.conftest import REPOSITORY
from tests.evaluation.conftest import BundledAs
from tests.evaluation.helpers import write_llama
from tests.models.conftest import whole_logits

pytestmark = pytest.mark.usefixtures("llama_cpp")

WRITTEN = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]  # by the gguf package, too
LOSSY = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"]


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(4, 2048, (300,), generator=torch.Generator().manual_seed(0))


def rms(x: Tensor) -> float:
    return float(x.double().pow(2).mean().sqrt())


def test_logits_at_every_position_are_those_of_transformers(
    bundled_as: BundledAs, tiny_llama: Path, ids: Tensor
) -> None:
    wanted = whole_logits(tiny_llama, ids.unsqueeze(0))[0]
    with Runtime(bundled_as("F32"), context=512) as runtime:
        found = runtime.logits(ids)
        assert (runtime.vocab_size, runtime.max_length) == (2048, 512)
    assert found.shape == wanted.shape == (300, 2048)
    # With keys and values cached in float16, as llama.cpp does by default, this is 2e-4.
    assert rms(found - wanted) < 1e-5 * float(wanted.std())


def test_a_vocabulary_is_not_needed(
    tiny_llama: Path, bundled_as: BundledAs, ids: Tensor, tmp_path: Path
) -> None:
    bare = write_llama(tiny_llama, tmp_path / "bare.gguf", vocabulary=False)
    with Runtime(bare) as runtime, Runtime(bundled_as("F32")) as other:
        assert runtime.vocab_size == 2048
        assert torch.equal(runtime.logits(ids), other.logits(ids))


def test_a_row_does_not_see_the_one_before_it(bundled_as: BundledAs, ids: Tensor) -> None:
    with Runtime(bundled_as("F32"), context=300) as runtime:
        alone = runtime.logits(ids[:100])
        runtime.logits(ids[100:])
        assert torch.equal(runtime.logits(ids[:100]), alone)


def test_only_the_positions_asked_for_are_given(bundled_as: BundledAs, ids: Tensor) -> None:
    with Runtime(bundled_as("F32")) as runtime:
        whole = runtime.logits(ids[:80])
        last = runtime.logits(ids[:80], first=50)
    assert last.shape == (30, 2048)
    assert rms(last - whole[50:]) < 1e-5 * float(whole.std())


@pytest.mark.parametrize("split", [{"batch": 37}, {"threads": 2}])
def test_batches_and_threads_change_nothing_but_rounding(
    bundled_as: BundledAs, ids: Tensor, split: dict[str, int]
) -> None:
    with Runtime(bundled_as("F32")) as whole, Runtime(bundled_as("F32"), **split) as parts:
        one, other = whole.logits(ids), parts.logits(ids)
    assert rms(one - other) < 1e-5 * float(one.std())


def test_quantized_weights_run_as_their_dequantized_values_would_but_for_the_activations(
    bundled_as: BundledAs, ids: Tensor
) -> None:
    with Runtime(bundled_as("F32")) as exact, Runtime(bundled_as("Q8_0")) as rounded:
        wanted, found = exact.logits(ids), rounded.logits(ids)
    assert 1e-4 < rms(found - wanted) / float(wanted.std()) < 0.1


def test_its_tokenizer_gives_the_checkpoints_ids(tiny_llama: Path, bundled_as: BundledAs) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    text = "Spaces  and\ttabs, 1234 digits,\n\nnew lines; ümläuts, 漢字 and 🙂, don't stop. <|eot_id|>"
    with Runtime(bundled_as("F32")) as runtime:
        plain = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert runtime.tokenize(text, add_special=False) == plain
        assert runtime.bos_id == 0
        assert runtime.tokenize(text) == [0, *plain]
        assert runtime.tokenize("", add_special=False) == []
        assert "llama.cpp" in runtime.describe
        assert "xllamacpp" in runtime.describe


def without_tensor(path: Path, target: Path) -> Path:
    target.write_bytes(path.read_bytes().replace(b"blk.0.attn_q.weight", b"blk.0.attn_z.weight"))
    return target


def test_what_llama_cpp_cannot_load_is_one_line_with_its_cause(bundled_as: BundledAs, tmp_path: Path) -> None:
    whole = bundled_as("F32")
    (tmp_path / "text.gguf").write_text("this is not a GGUF file", encoding="utf-8")
    (tmp_path / "cut.gguf").write_bytes(whole.read_bytes()[:5000])
    cases = {
        tmp_path / "text.gguf": "invalid magic",
        tmp_path / "cut.gguf": "failed to read key-value pairs",
        without_tensor(whole, tmp_path / "less.gguf"): "tensor 'blk.0.attn_q.weight' not found",
        tmp_path / "none.gguf": "no such file",
    }
    for path, cause in cases.items():
        with pytest.raises(ModelError, match=cause) as caught:
            Runtime(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)


def test_rows_that_do_not_fit_are_refused(bundled_as: BundledAs, ids: Tensor) -> None:
    with Runtime(bundled_as("F32"), context=64) as runtime:
        for row in (ids[:65], ids[:0]):
            with pytest.raises(ConfigError, match=r"1 to 64 fit"):
                runtime.logits(row)
        for token in (-1, 2048):
            with pytest.raises(ModelError, match="it has 2048"):
                runtime.logits(torch.tensor([5, token]))


def test_closing_twice_is_harmless(bundled_as: BundledAs) -> None:
    runtime = Runtime(bundled_as("F32"))
    runtime.close()
    runtime.close()


@pytest.mark.parametrize(("end", "status"), [("pass", 0), ("1 / 0", 1)])
def test_a_process_that_used_it_ends_as_any_other(bundled_as: BundledAs, end: str, status: int) -> None:
    program = (
        "import torch, pathlib\n"
        "from exlq.evaluation.llamacpp import Runtime\n"
        f"runtime = Runtime(pathlib.Path({str(bundled_as('Q8_0'))!r}), threads=2)\n"
        "print(runtime.logits(torch.arange(9)).shape)\n"
        f"{end}\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (status, "torch.Size([9, 2048])\n"), done.stderr


@pytest.mark.parametrize("kind", WRITTEN)
def test_the_stock_quantizer_writes_what_the_gguf_package_writes(kind: str) -> None:
    weight = torch.randn(40, 256, generator=torch.Generator().manual_seed(3))
    wanted = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[kind])
    assert quantize_chunk(kind, weight).numpy().tobytes() == wanted.tobytes()


@pytest.mark.parametrize("kind", LOSSY)
def test_importance_moves_the_error_to_where_it_counts_less(kind: str) -> None:
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(32, 512, generator=generator)
    importance = torch.rand(512, generator=generator) ** 4 + 1e-3

    def error(stored: Tensor) -> float:
        values = gguf.quants.dequantize(stored.numpy(), gguf.GGMLQuantizationType[kind])
        return float(((weight - torch.from_numpy(values)) ** 2 * importance).sum())

    plain, weighted = quantize_chunk(kind, weight), quantize_chunk(kind, weight, importance)
    assert error(weighted) < error(plain)
    for threads in (2, 5, 64):
        assert torch.equal(quantize_chunk(kind, weight, importance, threads), weighted)


def test_what_the_stock_quantizer_cannot_write_is_refused() -> None:
    weight = torch.zeros(2, 256)
    for kind in ("Q4_9", "Q8_K", "I32"):
        with pytest.raises(FormatError, match=f"{kind}: llama.cpp does not quantize to it"):
            quantize_chunk(kind, weight)
    with pytest.raises(FormatError, match=r"IQ2_XXS: .* with importance alone"):
        quantize_chunk("IQ2_XXS", weight)
    with pytest.raises(FormatError, match=r"100 input channels in Q8_0: a multiple of 32"):
        quantize_chunk("Q8_0", torch.zeros(2, 100))
    with pytest.raises(FormatError, match=r"importance of shape \(255,\): \(256,\) was wanted"):
        quantize_chunk("Q4_K", weight, torch.ones(255))


def test_a_changed_layout_of_its_parameters_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    for table, name in (
        (llamacpp_api.CONTEXT_DEFAULTS, "n_ubatch"),
        (llamacpp_api.MODEL_DEFAULTS, "lazy_mode"),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(table, name, 77)
            with pytest.raises(ConfigError, match=f"{name} .*77 was wanted"):
                llamacpp_api.library.__wrapped__()


def test_where_it_is_missing_what_to_install_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llamacpp_api, "PACKAGE", "no_such_package")
    assert not llamacpp.available()
    with pytest.raises(ConfigError, match=r"install exlq\[eval\]"):
        llamacpp_api.library.__wrapped__()
