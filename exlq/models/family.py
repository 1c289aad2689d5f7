"""How a model family is declared: its names and the linears of a block, in the order they are computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from exlq.types import GgufFamily

ATTENTION = (
    "self_attn"  # the child of a block that returns its output and its scores, the MLP only its output
)


@dataclass(frozen=True)
class Part:
    """One linear of a decoder block under its canonical name.

    Where the family fuses several linears in one module, `fused` is that module's path and `rows`
    gives, from the config, which of its output rows are this linear's.
    """

    name: str
    fused: str | None = None
    rows: Callable[[Any], slice] | None = None

    @property
    def module(self) -> str:
        """Path, inside the block, of the module that computes this linear."""
        return self.fused or self.name


@dataclass(frozen=True)
class Stage:
    """Linears of a block that see the same input, named `input_key`."""

    input_key: str
    linears: tuple[Part, ...]

    @property
    def module(self) -> str:
        """The first module of the block that receives this stage's input."""
        return self.linears[0].module

    @property
    def container(self) -> str:
        """The child of the block that holds these linears: `self_attn` or `mlp`."""
        return self.module.partition(".")[0]


DENSE_STAGES = (
    Stage("attn_in", (Part("self_attn.q_proj"), Part("self_attn.k_proj"), Part("self_attn.v_proj"))),
    Stage("attn_out", (Part("self_attn.o_proj"),)),
    Stage("mlp_in", (Part("mlp.gate_proj"), Part("mlp.up_proj"))),
    Stage("mlp_out", (Part("mlp.down_proj"),)),
)


@dataclass(frozen=True)
class Family:
    """What this package must know about a family beside what transformers knows.

    `architectures` are the names in config.json, `model_type` the class of transformers that runs
    them, `other_model_types` what else config.json may call it. `exl2_architecture` is the name
    under which ExLlamaV2 0.3.2 loads it, `gguf` what llama.cpp knows of it; None where there is
    none. In true sequence, the last stage of a container (`self_attn`, `mlp`) holds the one linear
    whose output is the container's; `norms_outputs` says whether that is normed before it is added to the
    residual stream. `stored_names` maps names inside a block to those older
    checkpoints use.
    """

    name: str
    architectures: tuple[str, ...]
    model_type: str
    exl2_architecture: str | None
    gguf: GgufFamily | None
    stages: tuple[Stage, ...] = DENSE_STAGES
    attention: str = "sdpa"
    norms_outputs: bool = False
    other_model_types: tuple[str, ...] = ()
    stored_names: Mapping[str, str] = field(default_factory=dict)
