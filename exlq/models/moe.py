"""A sparse MLP whose experts are linears of their own, so that each one's inputs and weights can be had.

What transformers computes with all experts of a block in two tensors is computed here expert by expert.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from exlq.errors import ModelError
from exlq.models.family import Experts


class Sizes(NamedTuple):
    """Channels and experts of a sparse MLP; `shared` is the width of its shared expert, 0 without one."""

    hidden: int
    width: int
    shared: int
    experts: int
    per_token: int


class Mlp(nn.Module):
    """down(act(gate(x)) · up(x)), its linears under the names of `names`."""

    def __init__(self, names: Experts, hidden: int, width: int, act: nn.Module) -> None:
        super().__init__()
        self._names = names
        self.add_module(names.gate, nn.Linear(hidden, width, bias=False))
        self.add_module(names.up, nn.Linear(hidden, width, bias=False))
        self.add_module(names.down, nn.Linear(width, hidden, bias=False))
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        """(…, hidden) to the same."""
        gate, up, down = (
            self.get_submodule(name) for name in (self._names.gate, self._names.up, self._names.down)
        )
        out: Tensor = down(self.act(gate(x)) * up(x))
        return out


class SparseMlp(nn.Module):
    """A router, its experts, and the expert that sees every token, where the family has one.

    Parameters are named as in checkpoints that hold each expert apart, but for the name of this module.
    """

    def __init__(self, names: Experts, sizes: Sizes, act: str, norms: bool) -> None:
        super().__init__()
        self.per_token = sizes.per_token
        self._norms = norms
        self.gate = nn.Linear(sizes.hidden, sizes.experts, bias=False)
        made = (Mlp(names, sizes.hidden, sizes.width, ACT2FN[act]) for _ in range(sizes.experts))
        self.experts = nn.ModuleList(made)
        self.shared_expert = self.shared_expert_gate = None
        if sizes.shared:
            self.shared_expert = Mlp(Experts("", normed=True), sizes.hidden, sizes.shared, ACT2FN[act])
            self.shared_expert_gate = nn.Linear(sizes.hidden, 1, bias=False)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The experts of every token of x, (tokens, hidden): (tokens, per_token) int64, and their weights.

        Source: transformers, the routers of mixtral, qwen2_moe and qwen3_moe: softmax over all experts, in
        float32, and only then the largest.
        """
        likely, chosen = self.gate(x).softmax(-1, dtype=torch.float32).topk(self.per_token, dim=-1)
        return chosen, (likely / likely.sum(-1, keepdim=True) if self._norms else likely).to(x.dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        """(batch, length, hidden) to the same."""
        beside = None
        if self.shared_expert is not None and self.shared_expert_gate is not None:
            beside = self.shared_expert_gate(hidden).sigmoid() * self.shared_expert(hidden)
        x = hidden.flatten(0, -2)  # (tokens, hidden)
        chosen, weights = self.route(x)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            tokens, places = (chosen == number).nonzero(as_tuple=True)
            if len(tokens):
                out.index_add_(0, tokens, expert(x[tokens]) * weights[tokens, places].unsqueeze(-1))
        out = out.reshape(hidden.shape)
        return out if beside is None else out + beside


def sparse_mlp(names: Experts, config: Any) -> SparseMlp:
    """The sparse MLP of a config of transformers.

    Raises:
        ModelError: for sizes that do not fit together.
    """

    def setting(key: str) -> Any:
        return getattr(config, key, None)

    shared = int(setting(names.shared_width) or 0) if names.shared_width else 0
    count, per_token = names.count(setting), int(setting("num_experts_per_tok") or 0)
    if not 0 < per_token <= count:
        raise ModelError(f"config.json sends a token to {per_token} of {count} experts; wanted 1 to {count}")
    sizes = Sizes(config.hidden_size, int(setting(names.width)), shared, count, per_token)
    return SparseMlp(names, sizes, config.hidden_act, names.norms(setting))
