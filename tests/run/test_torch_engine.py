"""EXL2 and Hugging Face directories in transformers, against models filled by hand."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from exlq.errors import ConfigError, ModelError
from exlq.formats.exl2_directory import Exl2Weights
from exlq.models.families import FAMILIES
from exlq.run import torch_model
from exlq.run.engine import Answer, Engine, Machine, Prompt, Sampling
from exlq.run.torch_engine import TorchEngine
from tests.conftest import TinyMaker

GREEDY = Sampling(max_tokens=24, temperature=0.0)
CPU = Machine(device="cpu")


def silent(_: str) -> None:
    pass


def answered(engine: Engine, prompt: Prompt, sampling: Sampling) -> tuple[Answer, list[str]]:
    pieces: list[str] = []
    return engine.answer(prompt, sampling, pieces.append), pieces


def by_hand(directory: Path, prompt: str, weights: dict[str, torch.Tensor] | None = None) -> str:
    """24 greedy tokens of transformers' own, stop tokens left out."""
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    if weights:
        model.load_state_dict(weights)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    for _ in range(24):
        with torch.no_grad():
            token = model(ids).logits[0, -1].argmax()
        if int(token) in (1, 4) and weights is None:
            break
        ids = torch.cat([ids, token.view(1, 1)], 1)
    whole = tokenizer.decode(ids[0], skip_special_tokens=True)
    return str(whole.removeprefix(tokenizer.decode(tokenizer(prompt)["input_ids"], skip_special_tokens=True)))


@pytest.fixture(scope="module")
def bundled(tiny_llama: Path) -> TorchEngine:
    return TorchEngine(tiny_llama, CPU, silent)


def test_a_checkpoint_goes_on_as_transformers_does(bundled: TorchEngine, tiny_llama: Path) -> None:
    answer, pieces = answered(bundled, "I have a dream", GREEDY)
    assert answer.text == "".join(pieces) == by_hand(tiny_llama, "I have a dream")
    assert len(pieces) > 10
    assert (answer.prompt_tokens, answer.generated_tokens, answer.ended) == (6, 24, "length")
    assert answer.generated_per_s is not None
    assert answer.generated_per_s > 0


def test_exl2_goes_on_as_transformers_with_the_dequantized_weights(
    exl2: Path, llama: Path, tmp_path: Path
) -> None:
    stored = Exl2Weights(exl2)
    weights = {key: stored.read(key).float() for key in stored.keys()}  # noqa: SIM118
    engine = TorchEngine(exl2, CPU, silent)
    assert "EXL2" in engine.about
    answer, _ = answered(engine, "I have a dream", GREEDY)
    wanted = by_hand(llama, "I have a dream", weights)
    assert len(answer.text) > 5
    assert wanted.startswith(answer.text)  # ours ends at a stop token, where there is one


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_every_family_is_filled_whole(tiny: TinyMaker, family: str, tied: bool) -> None:
    if family.startswith("gemma") and not tied:
        pytest.skip("Gemma's head is its embedding")
    if family == "yi":
        pytest.skip("transformers knows no Yi to compare with")
    directory, ids = tiny(family, tied), torch.randint(4, 200, (1, 9))
    made = torch_model.outline(directory, torch.device("cpu"))
    wanted: Any = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager" if family == "gemma2" else None
    )
    n_bytes = made.weight_bytes(torch.float32)
    assert n_bytes == sum(4 * parameter.numel() for parameter in wanted.parameters())
    module = torch_model.fill(made, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(module(ids).logits, wanted(ids).logits, rtol=1e-4, atol=1e-5)


def test_a_seed_gives_the_same_answer_and_another_another(bundled: TorchEngine) -> None:
    sampling = Sampling(max_tokens=20, seed=7)
    first, again, other = (
        answered(bundled, "I have a dream", s)[0].text
        for s in (sampling, sampling, replace(sampling, seed=8))
    )
    assert first == again != other


def test_top_k_of_one_is_greedy_and_a_penalty_is_felt(bundled: TorchEngine) -> None:
    greedy = answered(bundled, "I have a dream", GREEDY)[0].text
    assert answered(bundled, "I have a dream", Sampling(24, top_k=1, temperature=9.0))[0].text == greedy
    assert answered(bundled, "I have a dream", Sampling(24, top_p=1e-6, temperature=9.0))[0].text == greedy
    assert answered(bundled, "I have a dream", Sampling(24, min_p=1.0, temperature=9.0))[0].text == greedy
    assert answered(bundled, "I have a dream", replace(GREEDY, repeat_penalty=1.5))[0].text != greedy


def test_a_stop_text_ends_the_answer_and_is_no_part_of_it(bundled: TorchEngine) -> None:
    whole = answered(bundled, "I have a dream", GREEDY)[0].text
    stop = whole[20:24]
    answer, pieces = answered(bundled, "I have a dream", replace(GREEDY, stop=("absent", stop)))
    assert answer.text == "".join(pieces) == whole[: whole.index(stop)]
    assert answer.ended == "stop"
    assert answer.generated_tokens < 24


def test_every_stop_token_of_the_generation_config_ends_the_answer(tiny_llama: Path, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(tiny_llama, directory)
    engine = TorchEngine(directory, CPU, silent)
    text = answered(engine, "I have a dream", GREEDY)[0].text
    third = AutoTokenizer.from_pretrained(directory)(text, add_special_tokens=False)["input_ids"][3]
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, third]}))
    answer = answered(TorchEngine(directory, CPU, silent), "I have a dream", GREEDY)[0]
    assert (answer.ended, answer.generated_tokens) == ("stop", 4)
    assert text.startswith(answer.text)


def test_a_conversation_is_written_by_the_template(bundled: TorchEngine) -> None:
    said = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]
    written = (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nbe kind<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nhello<|eot_id|><|start_header_id|>assistant"
        "<|end_header_id|>\n\n"
    )
    by_template = answered(bundled, said, GREEDY)[0]
    assert by_template.text == answered(bundled, written.removeprefix("<|begin_of_text|>"), GREEDY)[0].text


def test_ctrl_c_ends_the_answer_and_what_came_is_kept(bundled: TorchEngine) -> None:
    pieces: list[str] = []

    def interrupts(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    answer = bundled.answer("I have a dream", GREEDY, interrupts)
    assert (answer.ended, answer.text) == ("interrupted", "".join(pieces))
    assert answered(bundled, "I have a dream", GREEDY)[0].ended == "length"


def test_prompt_and_answer_fit_into_the_context(tiny_llama: Path) -> None:
    engine = TorchEngine(tiny_llama, replace(CPU, ctx_size=10), silent)
    assert answered(engine, "I have a dream", GREEDY)[0].generated_tokens == 4
    with pytest.raises(ConfigError, match="a context of 10 was wanted"):
        answered(engine, "I have a dream " * 4, GREEDY)
    with pytest.raises(ConfigError, match="2 to 512 is wanted"):
        TorchEngine(tiny_llama, replace(CPU, ctx_size=513), silent)


def test_a_model_too_large_is_refused_before_its_weights_are_read(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_model, "free_bytes", lambda _: 10 << 20)
    monkeypatch.setattr("exlq.run.torch_engine.fill", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(ModelError, match=r"MiB on cpu as float32 .*context of 512, 10\.00 MiB is free"):
        TorchEngine(tiny_llama, CPU, silent)


def test_what_it_will_take_is_said_beforehand_and_dtype_halves_it(tiny_llama: Path) -> None:
    said: list[str] = []
    engine = TorchEngine(tiny_llama, replace(CPU, dtype="bf16"), said.append)
    assert "8.00 MiB of weights, 1.00 MiB of cache for 512 tokens" in said[0]
    assert answered(engine, "I have a dream", GREEDY)[0].generated_tokens == 24


@pytest.mark.parametrize("flags", [{"n_gpu_layers": 0}, {"no_mmap": True}, {"mlock": True}])
def test_flags_of_other_runtimes_are_refused(tiny_llama: Path, flags: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="transformers cannot honour it"):
        TorchEngine(tiny_llama, replace(CPU, **flags), silent)
