"""How the real model calls its blocks: masks, position embeddings and whatever else it passes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from exlq.models.skeleton import swapped


@dataclass(frozen=True)
class Call:
    """The hidden states a block receives, (batch, length, hidden_size), and everything beside them."""

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def record_calls(skeleton: Any, **inputs: Tensor) -> tuple[Call, ...]:
    """One call per block, from the model's own forward on `inputs` with stand-ins for the blocks.

    A stand-in returns what it is given, so every call has the hidden states of the first.
    """
    stand_ins = [_Recorder(block) for block in skeleton.model.layers]
    layers, norm = nn.ModuleList(stand_ins), nn.Identity()
    with torch.no_grad(), swapped(skeleton.model, layers=layers, norm=norm):
        skeleton.model(**inputs, use_cache=False)
    return tuple(stand_in.call for stand_in in stand_ins)


class _Recorder(nn.Module):
    """A block's stand-in with the block's plain attributes, by which a model may tell kinds of layer."""

    call: Call

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        for name, value in vars(block).items():
            if not name.startswith("_"):
                setattr(self, name, value)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.call = Call(hidden, args, kwargs)
        return hidden
