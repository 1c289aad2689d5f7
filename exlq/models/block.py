"""One decoder block with its weights: run, differentiated, quantized in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from exlq.models.calls import Call
from exlq.models.family import Stage
from exlq.models.layout import Linear
from exlq.models.staged import StagedPass

OnTensor = Callable[[str, Tensor], None]
ROUTED = "routed"  # the input key of what a block's experts receive, all together


class Block:
    """A materialised block; usable only inside the `with` that made it. All tensors are float32.

    `call_of` gives, for (batch, length), what the model calls this block with.
    """

    def __init__(
        self,
        module: Any,
        linears: tuple[Linear, ...],
        stages: tuple[Stage, ...],
        call_of: Callable[[int, int], Call],
        device: torch.device,
    ) -> None:
        self.module = module
        self.device = device
        self.stages = stages
        self._linears = linears
        self._call_of = call_of

    def forward(
        self, hidden: Tensor, on_input: OnTensor | None = None, on_expert: OnTensor | None = None
    ) -> Tensor:
        """(batch, length, hidden_size) to the same; `on_input` gets each stage's input key and input.

        In place of the experts' stages, it gets `ROUTED` and what all experts together receive, shaped as
        `hidden`. `on_expert` gets what each expert's stages do, (tokens, in_features), where it has tokens.
        """
        hooks = {**self._input_hooks(on_input), **self._expert_hooks(on_expert)}
        with torch.no_grad(), _hooked(self.module, hooks, before=True):
            return self.call(hidden)

    def backward(self, hidden: Tensor, grad_out: Tensor, on_gradient: OnTensor) -> Tensor:
        """Gradient with respect to `hidden`, from that with respect to the block's output.

        `on_gradient` gets, for every linear, its key and the gradient with respect to its output,
        (batch, length, out_features). The block is recomputed; no other graph is held.
        """
        leaf = hidden.detach().to(self.device, torch.float32).requires_grad_()
        hooks = self._gradient_hooks(on_gradient)
        with torch.enable_grad(), _hooked(self.module, hooks, before=False):
            out = self.call(leaf)
            (grad,) = torch.autograd.grad(out, leaf, grad_out.to(self.device, torch.float32))
        return grad

    def chosen_experts(self, x: Tensor) -> Tensor:
        """(tokens, per_token) int64: where the router sends what its container receives, (…, hidden_size)."""
        (container,) = {stage.container for stage in self.stages if stage.expert is not None}
        with torch.no_grad():
            chosen: Tensor = self.module.get_submodule(container).route(x.flatten(0, -2))[0]
        return chosen

    def set_weight(self, key: str, weight: Tensor) -> None:
        """Replace the weight of the linear `key` by `weight`, (out_features, in_features)."""
        linear = next(item for item in self._linears if item.spec.key == key)
        held = self.module.get_submodule(linear.module).weight.data
        held = held if linear.rows is None else held[linear.rows]
        assert held.shape == weight.shape, f"{key} has {tuple(held.shape)}, was given {tuple(weight.shape)}"
        held.copy_(weight)

    def staged(
        self,
        keep: Callable[[str, tuple[int, ...]], Tensor],
        batch_rows: int = 1,
        leader: StagedPass | None = None,
        frees: bool = False,
    ) -> StagedPass:
        """A pass in true sequence; `keep(name, shape)` makes the tensors for what is kept between stages.

        Inputs of experts are those of the tokens that the pass `leader` gives them, if there is one. With
        `frees`, weights go once they are no longer needed, and with them the block's use for another pass.
        """
        return StagedPass(self, keep, batch_rows, leader, frees)

    def call(self, hidden: Tensor) -> Tensor:
        """The block's own forward, called as the model calls it."""
        hidden = hidden.to(self.device, torch.float32)
        call = self._call_of(hidden.shape[0], hidden.shape[1])
        out: Tensor = self.module(hidden, *call.args, **call.kwargs)
        return out

    def _input_hooks(self, on_input: OnTensor | None) -> dict[str, Callable[..., None]]:
        if on_input is None:
            return {}
        alone = (stage for stage in self.stages if stage.expert is None)
        routed = (stage.container for stage in self.stages if stage.expert is not None)
        keys = {**{stage.module: stage.input_key for stage in alone}, **dict.fromkeys(routed, ROUTED)}
        return {path: _reporting(on_input, key) for path, key in keys.items()}

    def _expert_hooks(self, on_expert: OnTensor | None) -> dict[str, Callable[..., None]]:
        if on_expert is None:
            return {}
        routed = (stage for stage in self.stages if stage.expert is not None)
        return {stage.module: _reporting(on_expert, stage.input_key) for stage in routed}

    def _gradient_hooks(self, on_gradient: OnTensor) -> dict[str, Callable[..., None]]:
        def hook_of(linears: list[Linear]) -> Callable[..., None]:
            def report(grad: Tensor) -> None:
                for item in linears:
                    on_gradient(item.spec.key, grad if item.rows is None else grad[..., item.rows])

            def watch(_module: nn.Module, _args: tuple[Tensor, ...], out: Tensor) -> None:
                out.register_hook(report)  # type: ignore[no-untyped-call]

            return watch

        by_module: dict[str, list[Linear]] = {}
        for item in self._linears:
            by_module.setdefault(item.module, []).append(item)
        return {module: hook_of(linears) for module, linears in by_module.items()}


def _reporting(on_tensor: OnTensor, key: str) -> Callable[..., None]:
    return lambda _module, args: on_tensor(key, args[0])


@contextmanager
def _hooked(block: nn.Module, hooks: Mapping[str, Callable[..., None]], before: bool) -> Iterator[None]:
    """Hooks on modules of a block, by path, for the length of a `with`."""
    handles = []
    try:
        for path, hook in hooks.items():
            module = block.get_submodule(path)
            register = module.register_forward_pre_hook if before else module.register_forward_hook
            handles.append(register(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()
