"""EXL2 directories run by ExLlamaV2 itself, on an NVIDIA GPU; written after version 0.3.2."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from exlq.calibration import load_tokenizer
from exlq.run.engine import Answer, Ended, Machine, Prompt, Sampling, Tell, check_prompt, rate
from exlq.run.tokens import prompt_ids
from exlq.run.torch_model import outline, stop_ids

PAGE = 256  # tokens of the cache, whose length is a whole number of them


def usable() -> bool:
    """Whether ExLlamaV2 is installed and has a GPU."""
    return importlib.util.find_spec("exllamav2") is not None and torch.cuda.is_available()


class ExLlamaV2Engine:
    """The directory in ExLlamaV2's dynamic generator, over all GPUs it needs."""

    def __init__(self, directory: Path, machine: Machine, note: Tell) -> None:
        from exllamav2 import ExLlamaV2, ExLlamaV2Cache, ExLlamaV2Config, ExLlamaV2Tokenizer
        from exllamav2.generator import ExLlamaV2DynamicGenerator

        flags = ("--dtype", "--threads", "--n-gpu-layers", "--no-mmap", "--mlock")
        machine.refuse("ExLlamaV2", flags, "leave it out, or run in transformers with --device cuda:0")
        made = outline(directory, torch.device("cpu"))
        self._context = machine.context(made.max_length)
        self._templates: Any = load_tokenizer(directory)
        self._stop_ids = stop_ids(directory, made.config, self._templates)
        self.has_template = self._templates.chat_template is not None
        self.about = "EXL2, in ExLlamaV2"
        note(f"{directory}: {self.about}, context {self._context} tokens")
        config = ExLlamaV2Config(str(directory))
        model = ExLlamaV2(config)
        cache = ExLlamaV2Cache(model, max_seq_len=-(-self._context // PAGE) * PAGE, lazy=True)
        model.load_autosplit(cache)
        self._generator: Any = ExLlamaV2DynamicGenerator(
            model=model, cache=cache, tokenizer=ExLlamaV2Tokenizer(config)
        )

    def answer(self, prompt: Prompt, sampling: Sampling, tell: Tell) -> Answer:
        from exllamav2.generator import ExLlamaV2DynamicJob

        ids = prompt_ids(self._templates, prompt)
        check_prompt(len(ids), self._context)
        job = ExLlamaV2DynamicJob(
            input_ids=torch.tensor([ids]),
            max_new_tokens=min(sampling.max_tokens, self._context - len(ids)),
            gen_settings=_settings(sampling),
            seed=sampling.seed,
            stop_conditions=[*self._stop_ids, *sampling.stop],
        )
        self._generator.enqueue(job)
        pieces: list[str] = []
        last: dict[str, Any] = {}
        try:
            while not last:
                for result in self._generator.iterate():
                    if result["stage"] != "streaming":
                        continue
                    if text := result.get("text", ""):
                        pieces.append(text)
                        tell(text)
                    last = result if result["eos"] else last
        except KeyboardInterrupt:
            self._generator.cancel(job)
        return _result("".join(pieces), len(ids), len(pieces), last)

    def close(self) -> None:
        self._generator = None


def _settings(sampling: Sampling) -> Any:
    from exllamav2.generator import ExLlamaV2Sampler

    if sampling.temperature == 0:
        return ExLlamaV2Sampler.Settings.greedy(token_repetition_penalty=sampling.repeat_penalty)
    return ExLlamaV2Sampler.Settings(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        token_repetition_penalty=sampling.repeat_penalty,
        temperature_last=True,
    )


def _result(text: str, n_prompt: int, n_pieces: int, last: dict[str, Any]) -> Answer:
    if not last:
        return Answer(text, "interrupted", n_prompt, n_pieces, None, None)
    ended: Ended = "length" if last["eos_reason"] == "max_new_tokens" else "stop"
    return Answer(
        text=text,
        ended=ended,
        prompt_tokens=n_prompt,
        generated_tokens=last["new_tokens"],
        prompt_per_s=rate(n_prompt - last["cached_tokens"], last["time_prefill"]),
        generated_per_s=rate(last["new_tokens"] - 1, last["time_generate"]),
    )
