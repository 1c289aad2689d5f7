"""A prompt or a conversation as tokens, by the model directory's own tokenizer and chat template."""

from __future__ import annotations

from typing import Any

from exlq.errors import ConfigError, ModelError
from exlq.run.engine import Prompt


def prompt_ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    """The tokens of a text with what the tokenizer puts in front, or of a conversation up to the answer.

    Raises:
        ConfigError: for a prompt without a token.
        ModelError: if the chat template does not take the conversation.
    """
    text, is_text = (prompt, True) if isinstance(prompt, str) else (_written(tokenizer, prompt), False)
    ids: list[int] = tokenizer(text, add_special_tokens=is_text, verbose=False)["input_ids"]
    if not ids:
        raise ConfigError("the prompt is empty; give some text with -p")
    return ids


def _written(tokenizer: Any, messages: Any) -> str:
    try:
        text: str = tokenizer.apply_chat_template(
            [dict(message) for message in messages], add_generation_prompt=True, tokenize=False
        )
    except Exception as exc:  # a template is a program of the model's maker: it may raise anything
        reason = " ".join(str(exc).split())
        raise ModelError(
            f"the model's chat template does not take this conversation ({reason}); "
            "many take no system text: /system without text"
        ) from exc
    return text
