"""The real model of transformers without its weights, and the tools to run parts of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from exlq.errors import ModelError
from exlq.models.family import MLP, Family
from exlq.models.moe import sparse_mlp


def build_skeleton(config: Any, family: Family, device: torch.device) -> Any:
    """The model in float32 with its parameters on the meta device and its buffers on `device`.

    Raises ModelError where transformers cannot build a model from this config.
    """
    try:
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(
                config, attn_implementation=family.attention, dtype=torch.float32
            )
            _part_experts(skeleton, config, family)
        skeleton.eval().requires_grad_(False)
        _restore_buffers(skeleton, device)
    except ModelError:
        raise
    except Exception as exc:  # the library raises what it likes for settings it does not know
        reason = " ".join(f"{type(exc).__name__}: {exc}".split())
        raise ModelError(
            f"transformers cannot build {family.architectures[0]} from this config: {reason}"
        ) from exc
    skeleton.model.embed_tokens.padding_idx = None  # ids are renumbered when rows are gathered
    return skeleton


def _part_experts(skeleton: Any, config: Any, family: Family) -> None:
    """Puts our sparse MLPs, which hold each expert apart, in the place of the library's."""
    if family.experts is None:
        return
    for index, block in enumerate(skeleton.model.layers):
        if family.experts.in_block(lambda key: getattr(config, key, None), index):
            setattr(block, MLP, sparse_mlp(family.experts, config))


def _restore_buffers(skeleton: Any, device: torch.device) -> None:
    """Recompute from the config what no checkpoint holds (rotary frequencies, embedding scales).

    The library's own initialisation fills buffers; on parameters, still on meta, it has no effect.
    """
    for module in list(skeleton.modules()):
        names = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for name in names:
            buffer = module.get_buffer(name)
            filled = torch.full(buffer.shape, float("nan"), dtype=buffer.dtype, device="cpu")
            module.register_buffer(name, filled, persistent=name not in module._non_persistent_buffers_set)
        if names:
            skeleton._init_weights(module)
        for name in names:
            buffer = module.get_buffer(name)
            assert buffer.isfinite().all(), f"{type(module).__name__}.{name} was not recomputed"
            module.register_buffer(
                name, buffer.to(device), persistent=name not in module._non_persistent_buffers_set
            )


@contextmanager
def swapped(parent: nn.Module, **children: nn.Module) -> Iterator[None]:
    """Put stand-ins in the place of a module's children for a while."""
    kept = {name: parent.get_submodule(name) for name in children}
    try:
        for name, child in children.items():
            setattr(parent, name, child)
        yield
    finally:
        for name, child in kept.items():
            setattr(parent, name, child)


class Returns(nn.Module):
    """A stand-in that returns the same value whatever it is called with."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self._value = value

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        return self._value
