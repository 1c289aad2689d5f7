"""GGUF files run by llama.cpp."""

from __future__ import annotations

import json
import queue
import secrets
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from exlq.errors import ModelError
from exlq.run.engine import Answer, Ended, Machine, Messages, Prompt, Sampling, Tell, check_prompt, rate
from exlq.run.llamacpp_server import open_server
from exlq.sizes import format_bytes

TOO_LONG = "exceed_context_size_error"


class LlamaCppEngine:
    """llama.cpp's server with nobody to listen to but this process; what it has read stays in its cache."""

    def __init__(self, path: Path, machine: Machine, note: Tell) -> None:
        # The server listens on a free local port whether it is to or not: a key keeps others out.
        opened = open_server(path, machine, port=0, api_keys=[secrets.token_hex()])
        self._server, self._context = opened.server, opened.context
        self.path, self.has_template, self.about = path, opened.facts.has_template, opened.about
        note(f"{path}: {self.about}: {format_bytes(opened.facts.n_bytes)}, context {self._context} tokens")

    def answer(self, prompt: Prompt, sampling: Sampling, tell: Tell) -> Answer:
        pieces: list[str] = []
        last: Mapping[str, Any] = {}
        ended: Ended = "interrupted"
        try:
            for event in self._events(prompt, sampling):
                self._check(event)
                choice = event["choices"][0]
                piece = choice["text"] if "text" in choice else choice["delta"].get("content")
                if piece:
                    pieces.append(piece)
                    tell(piece)
                if choice["finish_reason"] is not None:
                    last = event.get("timings", {})
                    ended = "length" if choice["finish_reason"] == "length" else "stop"
        except KeyboardInterrupt:
            ended = "interrupted"
        return _result("".join(pieces), ended, len(pieces), last)

    def close(self) -> None:
        self._server = None

    def _events(self, prompt: Prompt, sampling: Sampling) -> Iterator[Mapping[str, Any]]:
        """What the server sends; it works in a thread of its own, so that Ctrl-C comes through here."""
        call, body = self._request(prompt, sampling)
        events: queue.SimpleQueue[Mapping[str, Any] | None] = queue.SimpleQueue()
        given_up = threading.Event()

        def receive(text: str) -> bool:
            events.put(json.loads(text))
            return given_up.is_set()

        def work() -> None:
            try:
                call(json.dumps(body), receive)
            finally:
                events.put(None)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            while (event := events.get()) is not None:
                yield event
        finally:
            given_up.set()
            thread.join()

    def _request(self, prompt: Prompt, sampling: Sampling) -> tuple[Any, dict[str, Any]]:
        body = {
            "stream": True,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "repeat_penalty": sampling.repeat_penalty,
            "seed": sampling.seed,
            "stop": list(sampling.stop),
        }
        if isinstance(prompt, str):
            return self._server.handle_completions, {**body, "prompt": prompt}
        messages: Messages = prompt
        # What a model thinks is shown as it writes it, not taken out.
        return self._server.handle_chat_completions, {
            **body,
            "messages": [dict(message) for message in messages],
            "reasoning_format": "none",
        }

    def _check(self, event: Mapping[str, Any]) -> None:
        error = event.get("error")
        if error is None:
            return
        if error.get("type") == TOO_LONG:
            check_prompt(error["n_prompt_tokens"], error["n_ctx"])
        raise ModelError(f"{self.path}: llama.cpp does not answer: {' '.join(str(error['message']).split())}")


def _result(text: str, ended: Ended, n_pieces: int, timings: Mapping[str, Any]) -> Answer:
    if not timings:
        return Answer(text, ended, None, n_pieces, None, None)
    return Answer(
        text=text,
        ended=ended,
        prompt_tokens=timings["prompt_n"] + timings["cache_n"],
        generated_tokens=timings["predicted_n"],
        prompt_per_s=rate(timings["prompt_n"], timings["prompt_ms"] / 1000),
        generated_per_s=rate(timings["predicted_n"] - 1, timings["predicted_ms"] / 1000),
    )
