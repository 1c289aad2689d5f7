"""An evaluation from directories: any of a base, a copy, an EXL2 model, on a file's text."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from exlq.errors import CalibrationError, ConfigError, ModelError
from exlq.evaluation.run import evaluate, open_any, usable_device
from exlq.formats.exl2_directory import Exl2Weights
from tests.helpers import make_model, make_tokenizer
from tests.models.conftest import whole_logits, whole_model
from tests.pipeline.conftest import Finished
from tests.pipeline.helpers import perturbed, write_texts

TEXT = [
    "The quick brown fox jumps over the lazy dog, again and again, until both of them are tired.",
    "",
    "Colours, harbours and neighbours: spelling changes from coast to coast; numbers (1, 2, 3) do not!",
    "for i in range(10):\n    print(i)\n",
]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("eval") / "text.parquet", TEXT * 6)


def byte_ids(context: int) -> torch.Tensor:
    """The text in llama-perplexity's chunks: the tiny tokenizer gives each byte an id of its own."""
    joined = "".join(row if row.endswith("\n") else f"{row}\n" for row in TEXT * 6)
    vocabulary = make_tokenizer().get_vocab()
    ids = [0, *(vocabulary["Ġ" if c == " " else "Ċ" if c == "\n" else c] for c in joined)]
    chunks = torch.from_numpy(np.array(ids[: len(ids) // context * context]).reshape(-1, context))
    chunks[:, 0] = 0
    return chunks


def test_an_exl2_directory_is_held_against_its_base(finished: Finished, text: Path, tmp_path: Path) -> None:
    base = finished.config.in_dir
    found = evaluate(finished.model, base, text, tmp_path, context=48)
    chunks = byte_ids(48)
    assert (found.n_chunks, found.context) == (len(chunks), 48)
    log_p = whole_logits(base, chunks).double().log_softmax(-1)[:, 24:-1]
    nll = -log_p.gather(-1, chunks[:, 25:].unsqueeze(-1)).mean()
    assert found.perplexity_base == pytest.approx(math.exp(nll), rel=1e-5)
    restored = whole_model(base)
    weights = Exl2Weights(finished.model)
    restored.load_state_dict({name: weights.read(name).float() for name in weights.keys()})  # noqa: SIM118
    with torch.no_grad():
        log_q = restored(input_ids=chunks).logits.double().log_softmax(-1)[:, 24:-1]
    assert found.kl_mean == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-4)
    assert 0 < found.kl_mean < 0.01


def test_the_context_is_the_models_maximum_where_that_is_less_than_512(
    llama: Path, text: Path, tmp_path: Path
) -> None:
    found = evaluate(llama, llama, text, tmp_path, max_chunks=3)
    assert (found.context, found.n_chunks, found.kl_mean) == (128, 3, 0)


def test_a_changed_copy_differs_and_more_noise_differs_more(llama: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    little, much = (perturbed(llama, tmp_path / f"{spread}", spread) for spread in (0.01, 0.1))
    kl = [evaluate(m, llama, text, tmp_path / "scratch", max_chunks=2).kl_mean for m in (little, much)]
    assert 0 < kl[0] < kl[1]


def test_what_cannot_be_compared_is_refused(llama: Path, text: Path, tmp_path: Path) -> None:
    other = make_model("llama", tmp_path / "other", tied=False, vocab_size=300)
    with pytest.raises(ModelError, match=r"has 300 tokens, .* has 272"):
        evaluate(other, llama, text, tmp_path)
    with pytest.raises(ModelError, match="no such directory"):
        evaluate(tmp_path / "nowhere", llama, text, tmp_path)
    with pytest.raises(ConfigError, match=r"200 tokens .* 2 to 128"):
        evaluate(llama, llama, text, tmp_path, context=200)
    for context in (0, 1, 2):
        with pytest.raises(ConfigError, match=f"{context}.* tokens|--ctx 2: at least 3"):
            evaluate(llama, llama, text, tmp_path, context=context)
    assert evaluate(llama, llama, text, tmp_path, context=3, max_chunks=4).n_tokens == 4
    with pytest.raises(CalibrationError, match="no such file"):
        evaluate(llama, llama, tmp_path / "none.parquet", tmp_path)
    short = write_texts(tmp_path / "short.parquet", ["a few words"])
    with pytest.raises(CalibrationError, match="256 are needed"):
        evaluate(llama, llama, short, tmp_path)


def test_both_kinds_of_directory_open_and_name_the_same_model(finished: Finished) -> None:
    cpu = torch.device("cpu")
    base, written = (open_any(path, cpu) for path in (finished.config.in_dir, finished.model))
    assert base.plain_tensors() == written.plain_tensors()
    assert [x.spec for x in base.linears(1)] == [x.spec for x in written.linears(1)]


@pytest.mark.parametrize("name", ["nonsense", "cuda:77", "meta", ""])
def test_a_device_that_is_not_here_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"--device .*cpu always works"):
        usable_device(name)
    assert usable_device("cpu") == torch.device("cpu")
