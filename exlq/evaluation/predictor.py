"""What an evaluation asks of a model, and the two that can give it: torch, block by block, and llama.cpp."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from torch import Tensor

from exlq.evaluation.dequantized import dequantized_copy
from exlq.evaluation.llamacpp import Runtime
from exlq.models.model import Model
from exlq.workspace import Workspace

TOKENS_AT_ONCE = 2048  # through a block
LEAST_CONTEXT = 32  # of a file that is opened for what it says of itself

# (chunk, positions from its middle on) → (positions, vocab) float32 logits. Chunks are asked for in order.
Logits = Callable[[int, slice], Tensor]


class Predictor(Protocol):
    """A causal language model, for chunks of tokens that each begin a text of their own."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_length(self) -> int:
        """Tokens a chunk may have at most."""
        ...

    def run(self, chunks: Tensor, otherwise: bool = False) -> AbstractContextManager[Logits]:
        """The logits on (n_chunks, context) int64 tokens.

        With `otherwise` the same work is split into other batches: equal in exact arithmetic.
        """
        ...


class Blockwise:
    """A model run by torch in float32, one block in memory at a time, hidden states in `workspace`."""

    def __init__(self, model: Model, workspace: Workspace, name: str) -> None:
        self._model = model
        self._workspace = workspace
        self._name = name

    @property
    def vocab_size(self) -> int:
        return self._model.vocab_size

    @property
    def max_length(self) -> int:
        return self._model.max_length

    @contextmanager
    def run(self, chunks: Tensor, otherwise: bool = False) -> Iterator[Logits]:
        usual = max(1, TOKENS_AT_ONCE // chunks.shape[1])
        other = 1 if usual > 1 else len(chunks)
        name = f"{self._name}-otherwise" if otherwise else self._name
        states = final_states(self._model, chunks, self._workspace, name, other if otherwise else usual)
        try:
            yield lambda chunk, cut: self._model.logits(self._model.final_norm(states[chunk, cut]))
        finally:
            self._workspace.remove(name)


class InLlamaCpp:
    """A GGUF file run by llama.cpp on the CPU.

    Where `copy` is given, what runs are the weights dequantized to float32, in a file made there at the
    first run and left to the caller.
    """

    def __init__(self, path: Path, threads: int = 1, copy: Path | None = None) -> None:
        self._path = path
        self._threads = threads
        self._copy = copy
        with Runtime(path, context=LEAST_CONTEXT) as runtime:
            self._vocab_size, self._max_length = runtime.vocab_size, runtime.max_length

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def max_length(self) -> int:
        return self._max_length

    @contextmanager
    def run(self, chunks: Tensor, otherwise: bool = False) -> Iterator[Logits]:
        context = chunks.shape[1]
        batch = -(-context // 2) if otherwise else context
        with Runtime(self._file(), context=context, threads=self._threads, batch=batch) as runtime:
            yield _LatestChunk(runtime, chunks).logits

    def _file(self) -> Path:
        if self._copy is None:
            return self._path
        return self._copy if self._copy.exists() else dequantized_copy(self._path, self._copy)


class _LatestChunk:
    """The logits of the chunk last asked for, so that it runs once however it is cut."""

    def __init__(self, runtime: Runtime, chunks: Tensor) -> None:
        self._runtime = runtime
        self._chunks = chunks
        self._first = chunks.shape[1] // 2
        self._held: tuple[int, Tensor] | None = None

    def logits(self, chunk: int, cut: slice) -> Tensor:
        if self._held is None or self._held[0] != chunk:
            self._held = None  # before the next ones are made
            self._held = (chunk, self._runtime.logits(self._chunks[chunk], self._first))
        return self._held[1][cut.start - self._first : cut.stop - self._first]


def final_states(model: Model, rows: Tensor, workspace: Workspace, name: str, at_once: int) -> Tensor:
    """(n_rows, length, hidden_size) float32 hidden states after the last block, before the norm."""
    states = workspace.tensor(name, (*rows.shape, model.hidden_size))
    batches = [slice(start, start + at_once) for start in range(0, len(rows), at_once)]
    for batch in batches:
        states[batch] = model.embed(rows[batch]).cpu()
    for index in range(model.n_blocks):
        with model.block(index) as block:
            for batch in batches:
                states[batch] = block.forward(states[batch]).cpu()
    return states
