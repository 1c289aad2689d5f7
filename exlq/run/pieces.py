"""Text from tokens as they come: whole characters only, nothing of a stop text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"  # what a decoder makes of bytes that are no character, or not yet
LEAD_TOKENS = 6  # of the prompt, before which the first token is decoded


class Detokenizer:
    """Text of one token after another, held back while a character is incomplete.

    Args:
        decode: text of tokens, special ones left out. The text of a token may depend on those before it,
            so each is decoded together with a few of them.
        prompt: the tokens before the first.
    """

    def __init__(self, decode: Callable[[list[int]], str], prompt: Sequence[int]) -> None:
        self._decode = decode
        self._ids = list(prompt[-LEAD_TOKENS:])
        self._from = 0  # where the lead begins
        self._told = len(self._ids)  # how many tokens have been given out as text

    def push(self, token: int) -> str:
        """The text that is complete with this token, often that of the token."""
        self._ids.append(token)
        text = self._new()
        if text.endswith(REPLACEMENT):
            return ""
        if text:
            self._from, self._told = self._told, len(self._ids)
        return text

    def flush(self) -> str:
        """What was held back, with a replacement for a character that never got complete."""
        text = self._new()
        self._from = self._told = len(self._ids)
        return text

    def _new(self) -> str:
        lead = self._decode(self._ids[self._from : self._told])
        return self._decode(self._ids[self._from :])[len(lead) :]


class Stops:
    """Text up to the first of the stop texts; the beginning of one is held back until it is clear."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = stop
        self._held = ""
        self.hit = False

    def push(self, text: str) -> str:
        """What can be shown now."""
        if self.hit:
            return ""
        self._held += text
        places = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        self.hit = bool(places)
        keep = len(self._held) - min(places) if places else self._undecided()
        shown = self._held[: len(self._held) - keep]
        self._held = "" if self.hit else self._held[len(shown) :]
        return shown

    def flush(self) -> str:
        """What was held back, now that no more comes."""
        shown, self._held = self._held, ""
        return shown

    def _undecided(self) -> int:
        """Length of the longest end of the text that begins a stop text."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        lengths = range(min(longest, len(self._held)), 0, -1)
        return next((n for n in lengths if any(s.startswith(self._held[-n:]) for s in self._stop)), 0)
