"""GGUF files in llama.cpp, against what xllamacpp gives directly."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from exlq.errors import ConfigError, ModelError
from exlq.evaluation.llamacpp import Runtime
from exlq.run import llamacpp_server
from exlq.run.engine import Machine, Sampling
from exlq.run.llamacpp_engine import LlamaCppEngine
from exlq.run.llamacpp_server import open_server
from tests.evaluation.conftest import BundledAs
from tests.run.test_torch_engine import answered, silent

GREEDY = Sampling(max_tokens=24, temperature=0.0)
ONE = Machine(threads=1)


@pytest.fixture(scope="module")
def engine(llama_cpp: None, plain_gguf: Path) -> LlamaCppEngine:
    return LlamaCppEngine(plain_gguf, ONE, silent)


def directly(path: Path, body: dict[str, Any]) -> str:
    xllamacpp = pytest.importorskip("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.cpuparams.n_threads, params.verbosity = str(path), 512, 1, -1
    server = xllamacpp.Server(params)
    found = server.handle_completions({"stream": False, **body})
    return str(found["choices"][0]["text"])


def test_greedy_is_what_xllamacpp_gives_and_what_the_logits_say(
    engine: LlamaCppEngine, plain_gguf: Path
) -> None:
    answer, pieces = answered(engine, "I have a dream", GREEDY)
    body = {"prompt": "I have a dream", "max_tokens": 24, "temperature": 0}
    assert answer.text == "".join(pieces) == directly(plain_gguf, body)
    assert (answer.prompt_tokens, answer.generated_tokens, answer.ended) == (6, 24, "length")
    with Runtime(plain_gguf) as runtime:
        ids = runtime.tokenize("I have a dream")
        for _ in range(3):
            ids.append(int(runtime.logits(torch.tensor(ids))[-1].argmax()))
        assert runtime.tokenize(f"I have a dream{''.join(pieces[:3])}") == ids


def test_a_seed_gives_the_same_answer_and_another_another(engine: LlamaCppEngine) -> None:
    sampling = Sampling(max_tokens=20, seed=7)
    first, again, other = (
        answered(engine, "I have a dream", s)[0].text for s in (sampling, sampling, replace(sampling, seed=8))
    )
    assert first == again != other


def test_a_stop_text_ends_the_answer_and_is_no_part_of_it(engine: LlamaCppEngine) -> None:
    whole = answered(engine, "I have a dream", GREEDY)[0].text
    stop = whole[20:24]
    answer, pieces = answered(engine, "I have a dream", replace(GREEDY, stop=(stop,)))
    assert answer.text == "".join(pieces) == whole[: whole.index(stop)]
    assert answer.ended == "stop"


def test_pieces_are_whole_characters(engine: LlamaCppEngine) -> None:
    wild = Sampling(max_tokens=200, temperature=50.0, top_k=0, top_p=1.0, min_p=0.0, seed=1)
    answer, pieces = answered(engine, "漢字", wild)
    assert answer.text == "".join(pieces)
    assert json.loads(json.dumps(answer.text)) == answer.text.encode("utf-8").decode("utf-8")


def test_ctrl_c_ends_the_answer_and_the_next_one_comes(engine: LlamaCppEngine) -> None:
    pieces: list[str] = []

    def interrupts(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    answer = engine.answer("I have a dream", replace(GREEDY, max_tokens=400), interrupts)
    assert (answer.ended, answer.text, answer.generated_tokens) == ("interrupted", "".join(pieces), 3)
    assert answered(engine, "I have a dream", GREEDY)[0].ended == "length"


def test_a_prompt_that_leaves_no_room_is_refused(engine: LlamaCppEngine) -> None:
    with pytest.raises(ConfigError, match="tokens of prompt, a context of 512 was wanted"):
        answered(engine, "word " * 600, GREEDY)


def test_flags_that_cannot_be_honoured_are_refused(
    llama_cpp: None, plain_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for flags, why in (
        ({"device": "cpu"}, "--device: llama.cpp cannot"),
        ({"dtype": "bf16"}, "--dtype: llama.cpp cannot"),
        ({"n_gpu_layers": 4}, "sees no GPU"),
        ({"ctx_size": 513}, "2 to 512 is wanted"),
    ):
        with pytest.raises(ConfigError, match=why):
            open_server(plain_gguf, Machine(**flags))
    monkeypatch.setattr(llamacpp_server, "_locked_bytes", lambda: 0)
    with pytest.raises(ConfigError, match=r"--mlock: the system let 0 B of"):
        open_server(plain_gguf, Machine(mlock=True))


def test_a_file_answers_the_same_mapped_or_read(llama_cpp: None, bundled_as: BundledAs) -> None:
    path = bundled_as("Q8_0")
    texts = {
        answered(LlamaCppEngine(path, replace(ONE, no_mmap=no_mmap), silent), "I have", GREEDY)[0].text
        for no_mmap in (True, False)
    }
    assert len(texts) == 1


def test_a_server_that_is_given_up_at_once_ends(llama_cpp: None, plain_gguf: Path) -> None:
    for _ in range(5):
        opened = open_server(plain_gguf, ONE)
        del opened


def test_what_is_missing_is_named(plain_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((ModelError, OSError)):
        open_server(tmp_path / "none.gguf", ONE)
    monkeypatch.setattr(llamacpp_server, "shared_library", lambda: None)
    with pytest.raises(ConfigError, match=r"pip install 'exlq\[eval\]'"):
        open_server(plain_gguf, ONE)
