"""A block in true sequence: each stage's inputs, while the linears of the stages before it change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from exlq.models.family import ATTENTION, Stage
from exlq.models.skeleton import Returns, swapped


class Runnable(Protocol):
    """What of a materialised block a staged pass uses."""

    module: Any
    stages: tuple[Stage, ...]

    def call(self, hidden: Tensor) -> Tensor: ...


class StagedPass:
    """Stages in order, then outputs; the block is computed about once in all.

    A stage's run stops at the inputs of its linears. The input of the last linear of a container
    (`self_attn`, `mlp`) is kept, and so is, for the stages after it, what that linear makes of it;
    a stub returning it then stands for the container. Whoever walks the pass quantizes the linears of a
    stage after its inputs and before the next stage's. Kept are, per token, the inputs of o_proj and
    down_proj and the output of o_proj, in tensors from `keep(name, shape)`.
    """

    def __init__(
        self, block: Runnable, keep: Callable[[str, tuple[int, ...]], Tensor], batch_rows: int
    ) -> None:
        self._block = block
        self._keep = keep
        self._batch_rows = batch_rows
        self._kept: dict[str, Tensor] = {}
        self._closing = {stage.container: stage for stage in block.stages}
        self._done: list[str] = []

    def inputs(self, stage: str, states: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Inputs of a stage's linears, (rows, length, in_features) float32, each with its rows of `states`.

        `states` is (n_rows, length, hidden_size), the block's input. Must be walked to its end, and
        the stages in their order.
        """
        wanted = self._block.stages[len(self._done)]
        assert stage == wanted.input_key, f"the stage after {self._done} is {wanted.input_key}, not {stage}"
        containers = [s.container for s in self._block.stages[: len(self._done)] if self._closed(s)]
        for rows in self._batches(states):
            with torch.no_grad():
                stubs = self._stubs(containers, rows, len(states))
                with swapped(self._block.module, **stubs):
                    x = _input_of(self._block, wanted.module, states[rows])
                if self._closed(wanted):
                    self._store(stage, rows, x, len(states))
            yield rows, x
        self._done.append(stage)

    def skip(self, stage: str, states: Tensor) -> None:
        """Goes past a stage whose inputs nobody wants: what later stages need of it is kept all the same."""
        for _ in self.inputs(stage, states):
            pass

    def closes(self, stage: str) -> bool:
        """Whether a stage's linear makes the output of its container."""
        return any(each.input_key == stage for each in self._closing.values())

    def residual(self, states: Tensor, rows: slice) -> Tensor:
        """(rows, length, hidden_size) float32, the residual stream that the present container adds to.

        To be asked for while `inputs` of a stage is walked that closes a container.
        """
        stream = states[rows].float()
        for stage in self._block.stages[: len(self._done)]:
            if self._closed(stage):
                stream = stream + self._kept[f"{stage.input_key}_output"][rows].to(stream)
        return stream

    def outputs(self, states_in: Tensor, states_out: Tensor) -> None:
        """Fill `states_out` with the block's outputs for `states_in`; they may be the same tensor."""
        assert len(self._done) == len(self._block.stages), f"only the stages {self._done} were walked"
        for rows in self._batches(states_in):
            with torch.no_grad():
                stubs = self._stubs(list(self._closing), rows, len(states_in))
                with swapped(self._block.module, **stubs):
                    states_out[rows] = self._block.call(states_in[rows]).to(states_out)

    def _closed(self, stage: Stage) -> bool:
        return self._closing[stage.container] is stage

    def _batches(self, states: Tensor) -> Iterator[slice]:
        for start in range(0, len(states), self._batch_rows):
            yield slice(start, min(start + self._batch_rows, len(states)))

    def _stubs(self, containers: list[str], rows: slice, n_rows: int) -> dict[str, nn.Module]:
        outputs = {name: self._output(name, rows, n_rows) for name in containers}
        return {name: Returns((out, None) if name == ATTENTION else out) for name, out in outputs.items()}

    def _output(self, container: str, rows: slice, n_rows: int) -> Tensor:
        """What a container returns for these rows: computed in the stage after it, then read back."""
        closing = self._closing[container]
        name = f"{closing.input_key}_output"
        linear = self._block.module.get_submodule(closing.module)
        if closing.input_key != self._done[-1]:
            return self._kept[name][rows].to(linear.weight)
        x = self._kept[closing.input_key][rows].to(linear.weight, copy=True)  # into aligned memory
        out: Tensor = linear(x)
        if len(self._done) < len(self._block.stages):
            self._store(name, rows, out, n_rows)
        return out

    def _store(self, name: str, rows: slice, x: Tensor, n_rows: int) -> None:
        if name not in self._kept:
            self._kept[name] = self._keep(name, (n_rows, *x.shape[1:]))
        self._kept[name][rows] = x.to(self._kept[name])


def _input_of(block: Runnable, path: str, hidden: Tensor) -> Tensor:
    """Run the block until the module at `path` is called; what it would have received."""

    def stop(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        raise _StopError(args[0])

    handle = block.module.get_submodule(path).register_forward_pre_hook(stop)
    try:
        block.call(hidden)
    except _StopError as reached:
        return reached.x
    finally:
        handle.remove()
    raise AssertionError(f"the block never called {path}")


class _StopError(Exception):
    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = x
