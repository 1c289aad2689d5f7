"""EXL2 and Hugging Face directories run by transformers, on CPU or GPU."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from exlq.calibration import load_tokenizer
from exlq.errors import ConfigError
from exlq.evaluation.run import usable_device
from exlq.run.engine import Answer, Ended, Machine, Prompt, Sampling, Tell, check_prompt, rate
from exlq.run.pieces import Detokenizer, Stops
from exlq.run.tokens import prompt_ids
from exlq.run.torch_model import check_room, fill, outline, stop_ids

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


class TorchEngine:
    """The weights dequantized into transformers' model, which `generate`s; the whole prompt every time.

    Raises:
        ConfigError: for a device or flag that cannot be used here.
        ModelError: for a directory that is not whole, or a model that does not fit into memory.
    """

    def __init__(self, directory: Path, machine: Machine, note: Tell) -> None:
        """Reads the weights; `note` is told first what that will take."""
        machine.refuse(
            "transformers", ("--n-gpu-layers", "--no-mmap", "--mlock"), "it is for GGUF files; see --device"
        )
        name = machine.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._device = usable_device(name)
        dtype = _dtype(machine.dtype or ("float32" if self._device.type == "cpu" else "bf16"))
        made = outline(directory, self._device)
        self._context = machine.context(made.max_length)
        self._tokenizer: Any = load_tokenizer(directory)
        self._stop_ids = stop_ids(directory, made.config, self._tokenizer)
        self.has_template = self._tokenizer.chat_template is not None
        kind = "EXL2 dequantized" if made.exl2 else "the checkpoint"
        self.about = f"{kind}, in transformers on {self._device}, {str(dtype)[6:]}"
        note(f"{directory}: {self.about}: {check_room(made, self._device, dtype, self._context)}")
        self._module = fill(made, self._device, dtype)

    def answer(self, prompt: Prompt, sampling: Sampling, tell: Tell) -> Answer:
        ids = prompt_ids(self._tokenizer, prompt)
        check_prompt(len(ids), self._context)
        listener = _Listener(self._tokenizer, ids, self._stop_ids, Stops(sampling.stop), tell)
        torch.manual_seed(sampling.seed)
        interrupted = False
        begun = time.perf_counter()
        try:
            self._module.generate(
                torch.tensor([ids], device=self._device),
                attention_mask=torch.ones(1, len(ids), dtype=torch.int64, device=self._device),
                generation_config=self._settings(sampling, len(ids)),
                logits_processor=_steps(sampling),
                stopping_criteria=StoppingCriteriaList([listener]),
            )
        except KeyboardInterrupt:
            interrupted = True
        listener.finish()
        return listener.result(begun, interrupted)

    def close(self) -> None:
        self._module = None

    def _settings(self, sampling: Sampling, n_prompt: int) -> GenerationConfig:
        """All drawing but the draw itself is left to our own steps, so that their order is llama.cpp's."""
        stop = self._stop_ids or None
        return GenerationConfig(
            max_new_tokens=min(sampling.max_tokens, self._context - n_prompt),
            do_sample=sampling.temperature > 0,
            top_k=0 if sampling.temperature > 0 else None,
            eos_token_id=stop,
            pad_token_id=stop[0] if stop else 0,
        )


class _Listener:
    """Told of every new token by `generate`, which ends when it says so."""

    def __init__(self, tokenizer: Any, ids: list[int], stop_ids: list[int], stops: Stops, tell: Tell) -> None:
        def decode(tokens: list[int]) -> str:
            text: str = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            return text

        self._text = Detokenizer(decode, ids)
        self._n_prompt, self._stop_ids, self._stops, self._tell = len(ids), stop_ids, stops, tell
        self._pieces: list[str] = []
        self._times: list[float] = []
        self._ended: Ended = "length"

    def __call__(self, ids: Tensor, _scores: Any, **_: Any) -> Tensor:
        """(1,) bool for (1, n) tokens: whether the answer is over."""
        token = int(ids[0, -1])
        self._times.append(time.perf_counter())
        if token in self._stop_ids:
            self._ended = "stop"
        else:
            self._say(self._stops.push(self._text.push(token)))
            self._ended = "stop" if self._stops.hit else "length"
        return torch.tensor([self._ended == "stop"], device=ids.device)

    def finish(self) -> None:
        """Gives out what was held back."""
        if not self._stops.hit:
            self._say(self._stops.push(self._text.flush()) + self._stops.flush())

    def result(self, begun: float, interrupted: bool) -> Answer:
        """Seconds to the first token count as the prompt's, those after it as the others'."""
        first, last = (self._times[0], self._times[-1]) if self._times else (begun, begun)
        return Answer(
            text="".join(self._pieces),
            ended="interrupted" if interrupted else self._ended,
            prompt_tokens=self._n_prompt,
            generated_tokens=len(self._times),
            prompt_per_s=rate(self._n_prompt, first - begun),
            generated_per_s=rate(len(self._times) - 1, last - first),
        )

    def _say(self, text: str) -> None:
        if text:
            self._pieces.append(text)
            self._tell(text)


def _steps(sampling: Sampling) -> LogitsProcessorList:
    steps: list[Any] = []
    if sampling.repeat_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(penalty=sampling.repeat_penalty))
    if sampling.temperature > 0:
        if sampling.top_k > 0:
            steps.append(TopKLogitsWarper(top_k=sampling.top_k))
        if sampling.top_p < 1:
            steps.append(TopPLogitsWarper(top_p=sampling.top_p))
        if sampling.min_p > 0:
            steps.append(MinPLogitsWarper(min_p=sampling.min_p))
        steps.append(TemperatureLogitsWarper(float(sampling.temperature)))
    return LogitsProcessorList(steps)


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ConfigError(f"--dtype {name}: one of {', '.join(DTYPES)} is wanted")
    return DTYPES[name]
