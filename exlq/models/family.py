"""How a model family is declared: its names and the linears of a block, in the order they are computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from exlq.types import GgufFamily

ATTENTION = (
    "self_attn"  # the child of a block that returns its output and its scores, the MLP only its output
)
MLP = "mlp"
EXPERTS, SHARED = "mlp.experts", "mlp.shared_expert"  # inside a sparse MLP


@dataclass(frozen=True)
class Part:
    """One linear of a decoder block under its canonical name.

    Where the family fuses several linears in one module, `fused` is that module's path and `rows`
    gives, from the config, which of its output rows are this linear's. `stack` is shared by linears of a
    shape that some formats hold in one tensor.
    """

    name: str
    fused: str | None = None
    rows: Callable[[Any], slice] | None = None
    stack: str | None = None

    @property
    def module(self) -> str:
        """Path, inside the block, of the module that computes this linear."""
        return self.fused or self.name


@dataclass(frozen=True)
class Stage:
    """Linears of a block that see the same input, named `input_key`.

    Those of an `expert` see only the tokens that the router of their container sends it.
    """

    input_key: str
    linears: tuple[Part, ...]
    expert: int | None = None

    @property
    def module(self) -> str:
        """The first module of the block that receives this stage's input."""
        return self.linears[0].module

    @property
    def owner(self) -> str:
        """The module of the block that calls `module`: the MLP or expert that it is of."""
        return self.module.rpartition(".")[0]

    @property
    def own_path(self) -> str:
        """`module` inside its owner."""
        return self.module.rpartition(".")[2]

    @property
    def container(self) -> str:
        """The child of the block that holds these linears: `self_attn` or `mlp`."""
        return self.module.partition(".")[0]


def mlp_stages(name: str, path: str) -> tuple[Stage, ...]:
    """The two stages of an MLP at `path` of a block."""
    return (
        Stage(f"{name}_in", (Part(f"{path}.gate_proj"), Part(f"{path}.up_proj"))),
        Stage(f"{name}_out", (Part(f"{path}.down_proj"),)),
    )


DENSE_STAGES = (
    Stage("attn_in", (Part("self_attn.q_proj"), Part("self_attn.k_proj"), Part("self_attn.v_proj"))),
    Stage("attn_out", (Part("self_attn.o_proj"),)),
    *mlp_stages("mlp", "mlp"),
)

Setting = Callable[[str], Any]  # the value of a key of config.json, None where there is none


@dataclass(frozen=True)
class Experts:
    """The sparse blocks of a family: a router gives every token to a few of many small MLPs.

    `gate`, `up` and `down` are what checkpoints call an expert's linears, `width` the key of config.json
    for their inner channels; `shared_width` that of one more MLP that sees every token, behind a gate of
    its own. `normed` says whether the weights of a token's experts are made to add up to 1, or names the key.
    """

    width: str
    normed: bool | str
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    shared_width: str | None = None

    def count(self, setting: Setting) -> int:
        """Experts of a sparse block."""
        return int(setting("num_local_experts") or setting("num_experts") or 0)

    def norms(self, setting: Setting) -> bool:
        """Whether the weights of a token's experts add up to 1."""
        return bool(setting(self.normed)) if isinstance(self.normed, str) else self.normed

    def share(self, setting: Setting) -> float:
        """The part of all tokens that an expert gets, on average."""
        return int(setting("num_experts_per_tok") or 0) / max(1, self.count(setting))

    def in_block(self, setting: Setting, index: int) -> bool:
        """Whether block `index` has experts; the others have an MLP."""
        step = setting("decoder_sparse_step") or 1
        dense = setting("mlp_only_layers") or ()
        return self.count(setting) > 0 and index not in dense and (index + 1) % step == 0

    def stages(self, setting: Setting) -> tuple[Stage, ...]:
        """The shared expert's stages, then what all experts see, then what their second halves see."""
        numbers = range(self.count(setting))
        shared = mlp_stages("shared", SHARED) if self.shared_width else ()
        pairs = [(self._into(number), self._out_of(number)) for number in numbers]
        return (*shared, *(into for into, _ in pairs), *(out for _, out in pairs))

    def _into(self, number: int) -> Stage:
        parts = tuple(self._part(number, name) for name in (self.gate, self.up))
        return Stage(f"expert-{number}_in", parts, number)

    def _out_of(self, number: int) -> Stage:
        return Stage(f"expert-{number}_out", (self._part(number, self.down),), number)

    def _part(self, number: int, name: str) -> Part:
        return Part(f"{EXPERTS}.{number}.{name}", stack=f"{EXPERTS}.{name}")


@dataclass(frozen=True)
class Family:
    """What this package must know about a family beside what transformers knows.

    `architectures` are the names in config.json, `model_type` the class of transformers that runs
    them, `other_model_types` what else config.json may call it. `exl2_architecture` is the name
    under which ExLlamaV2 0.3.2 loads it, `gguf` what llama.cpp knows of it; None where there is
    none. In true sequence, the last stage of a container (`self_attn`, `mlp`) holds the one linear
    whose output is the container's; `norms_outputs` says whether that is normed before it is added to the
    residual stream. `stored_names` maps names inside a block to those older
    checkpoints use, `renamed` the name of a block's child to that in checkpoints and in this package's keys.
    `stages` are those of a block without `experts`.
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
    renamed: Mapping[str, str] = field(default_factory=dict)
    experts: Experts | None = None

    def stages_of(self, setting: Setting, index: int) -> tuple[Stage, ...]:
        """The stages of block `index`, in true sequence."""
        if self.experts is None or not self.experts.in_block(setting, index):
            return self.stages
        attention = tuple(stage for stage in self.stages if stage.container == ATTENTION)
        return (*attention, *self.experts.stages(setting))

    def share(self, setting: Setting, key: str) -> float:
        """The part of all tokens that reaches the linear `key`, on average."""
        routed = self.experts is not None and f".{self.canonical(EXPERTS)}." in key
        return self.experts.share(setting) if self.experts is not None and routed else 1.0

    def canonical(self, name: str) -> str:
        """The canonical name of what a block has at the path `name`, both inside the block."""
        child, dot, rest = name.partition(".")
        return f"{self.renamed.get(child, child)}{dot}{rest}"
