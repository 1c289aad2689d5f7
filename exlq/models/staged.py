"""A block in true sequence: each stage's inputs, while the linears of the stages before it change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from exlq.models.family import ATTENTION, Stage
from exlq.models.routed import RoutedTokens
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
    down_proj and the output of o_proj, in tensors from `keep(name, shape)`. With `frees`, weights that no
    later stage needs are dropped on the way: the block is good for this pass alone.

    Of a container with experts, its own input is kept, and which experts each token goes to: that hangs on
    no linear of theirs. An expert's stages get its tokens alone, and where these are few some others
    (`RoutedTokens`): those that it has in the pass `leader`, if there is one.
    """

    def __init__(
        self,
        block: Runnable,
        keep: Callable[[str, tuple[int, ...]], Tensor],
        batch_rows: int,
        leader: StagedPass | None = None,
        frees: bool = False,
    ) -> None:
        self._block = block
        self._frees = frees
        self._keep = keep
        self._batch_rows = batch_rows
        self._leader = leader
        self._routed: RoutedTokens | None = None
        self._kept: dict[str, Tensor] = {}
        self._closing = {stage.container: stage for stage in block.stages}
        self._done: list[str] = []

    def inputs(self, stage: str, states: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Inputs of a stage's linears, (rows, length, in_features) float32, each with its rows of `states`.

        Of an expert's stage (tokens, in_features), the tokens among these rows. `states` is
        (n_rows, length, hidden_size), the block's input. Must be walked to its end, and the stages in
        their order.
        """
        wanted = self._block.stages[len(self._done)]
        assert stage == wanted.input_key, f"the stage after {self._done} is {wanted.input_key}, not {stage}"
        if wanted.expert is not None:
            yield from self._expert_inputs(wanted, wanted.expert, states)
            self._done.append(stage)
            return
        containers = [s.container for s in self._block.stages[: len(self._done)] if self._closed(s)]
        for rows in self._batches(states):
            with torch.no_grad():
                stubs = self._stubs(containers, rows, len(states))
                with swapped(self._block.module, **stubs):
                    x = _input_of(self._block, wanted.module, states[rows])
                if self._closed(wanted):
                    self._store(stage, rows, x, len(states))
            yield rows, x
        if self._frees and self._closed(wanted):
            self._drop_before(wanted)
        self._done.append(stage)

    def skip(self, stage: str, states: Tensor) -> None:
        """Goes past a stage whose inputs nobody wants: what later stages need of it is kept all the same."""
        wanted = self._block.stages[len(self._done)]
        if wanted.expert is None:
            for _ in self.inputs(stage, states):
                pass
            return
        self._routed = self._routed or self._route(wanted, states)
        self._done.append(stage)

    def reached(self, stage: str) -> int | None:
        """Tokens that the expert of a stage has of its own; None where it has plenty, or all tokens."""
        wanted = next(each for each in self._block.stages if each.input_key == stage)
        if wanted.expert is None or self._routed is None:
            return None
        return self._routed.reached(wanted.expert, self._in_features(wanted))

    def closes(self, stage: str) -> bool:
        """Whether a stage's linear alone makes the output of its container."""
        return any(each.input_key == stage and each.expert is None for each in self._closing.values())

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

    def _expert_inputs(self, stage: Stage, expert: int, states: Tensor) -> Iterator[tuple[slice, Tensor]]:
        self._routed = self._routed or self._route(stage, states)
        leading = self._routed if self._leader is None else self._leader._routed
        assert leading is not None, "the leader goes first"
        run, weight = self._block.module.get_submodule(stage.owner), self._weight(stage)
        for rows, tokens in leading.batches(expert, weight.shape[1], self._batch_rows):
            with torch.no_grad():
                x = input_of(run, run, stage.own_path, self._routed.inputs(tokens).to(weight))
            yield rows, x  # outside: two passes that are walked in turn would leave gradients off

    def _route(self, stage: Stage, states: Tensor) -> RoutedTokens:
        """Keeps what a container with experts receives, and where its router sends every token."""
        closed = [s.container for s in self._block.stages[: len(self._done)] if self._closed(s)]
        router, chosen = self._block.module.get_submodule(stage.container), []
        name = self._closing[stage.container].input_key
        for rows in self._batches(states):
            with torch.no_grad(), swapped(self._block.module, **self._stubs(closed, rows, len(states))):
                x = _input_of(self._block, stage.container, states[rows])
                self._store(name, rows, x, len(states))
                chosen.append(router.route(x.flatten(0, -2))[0].cpu())
        return RoutedTokens(self._kept[name], torch.cat(chosen))

    def _weight(self, stage: Stage) -> Tensor:
        weight: Tensor = self._block.module.get_submodule(stage.module).weight
        return weight

    def _in_features(self, stage: Stage) -> int:
        return self._weight(stage).shape[1]

    def _drop_before(self, closing: Stage) -> None:
        """Gives up the weights that led to the kept inputs of the last linear of a container."""
        for stage in self._block.stages[: len(self._done)]:
            if stage.container == closing.container:
                for part in stage.linears:
                    linear = self._block.module.get_submodule(part.module)
                    empty = torch.empty_like(linear.weight, device="meta")
                    linear.weight = nn.Parameter(empty, requires_grad=False)

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
        weight = self._weight(closing)
        if closing.input_key != self._done[-1]:
            return self._kept[name][rows].to(weight)
        x = self._kept[closing.input_key][rows].to(weight, copy=True)  # into aligned memory
        path = closing.module if closing.expert is None else container
        out: Tensor = self._block.module.get_submodule(path)(x)
        if len(self._done) < len(self._block.stages):
            self._store(name, rows, out, n_rows)
        return out

    def _store(self, name: str, rows: slice, x: Tensor, n_rows: int) -> None:
        if name not in self._kept:
            self._kept[name] = self._keep(name, (n_rows, *x.shape[1:]))
        self._kept[name][rows] = x.to(self._kept[name])


def _input_of(block: Runnable, path: str, hidden: Tensor) -> Tensor:
    """Run the block until the module at `path` is called; what it would have received."""
    return input_of(block.call, block.module, path, hidden)


def input_of(run: Callable[[Tensor], object], module: nn.Module, path: str, x: Tensor) -> Tensor:
    """`run(x)` until the module at `path` in `module` is called; what it would have received."""

    def stop(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        raise _StopError(args[0])

    handle = module.get_submodule(path).register_forward_pre_hook(stop)
    try:
        run(x)
    except _StopError as reached:
        return reached.x
    finally:
        handle.remove()
    raise AssertionError(f"{path} was never called")


class _StopError(Exception):
    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = x
