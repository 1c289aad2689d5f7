"""The linears of a model and the tensors it wants, from the skeleton and the family's declaration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from exlq.models.family import EXPERTS, Experts, Family, Part, Stage
from exlq.types import LinearSpec

HEAD_KEY = "lm_head"
EMBEDDING_KEY = "model.embed_tokens"
NORM_KEY = "model.norm"


@dataclass(frozen=True)
class Linear:
    """One linear of a block: what it is, which input it sees and where the block computes it.

    `module` is the path inside the block, `rows` the linear's output rows where that module is
    fused. Linears of one `tie`, itself a key, are one tensor in some formats: those of a fused module, or
    a projection of all experts.
    """

    spec: LinearSpec
    stage: str
    module: str
    rows: slice | None = None
    tie: str | None = None


class Stacked(NamedTuple):
    """Where newer checkpoints have an expert's linear: `rows` of matrix `expert` of a tensor of `shape`."""

    key: str
    shape: tuple[int, int, int]
    expert: int
    rows: slice


@dataclass(frozen=True)
class Layout:
    """Every tensor of the model under its canonical name, and the other places it may be stored in.

    `stages` are those of each block, as `blocks` has its linears. `wanted` gives shapes, `named` the
    module's name of what has another than the canonical one. `fused` maps a split name to the fused one
    and the rows in it, `fused_rows` the whole rows of a fused tensor, `stacked` a linear of an expert to
    that of all; `older` and `tied` map to other names.
    """

    blocks: tuple[tuple[Linear, ...], ...]
    stages: tuple[tuple[Stage, ...], ...]
    wanted: Mapping[str, tuple[int, ...]]
    fused: Mapping[str, tuple[str, slice]]
    fused_rows: Mapping[str, int]
    named: Mapping[str, str]
    stacked: Mapping[str, Stacked]
    older: Mapping[str, str]
    tied: Mapping[str, str]

    def sources(self, parameter: str) -> tuple[str, ...]:
        """Canonical names of what a parameter of the module is made of, in the order of its rows."""
        return self._sources.get(parameter, (parameter,))

    @cached_property
    def _sources(self) -> dict[str, tuple[str, ...]]:
        found: dict[str, tuple[str, ...]] = {own: (canonical,) for canonical, own in self.named.items()}
        for part, (key, _) in self.fused.items():
            found[key] = (*found.get(key, ()), part)
        return found


def block_key(index: int) -> str:
    return f"model.layers.{index}"


def layout_of(skeleton: Any, config: Any, family: Family) -> Layout:
    """Lay out a model whose parameters are named as transformers names them."""
    modules = list(skeleton.model.layers)
    stages = tuple(family.stages_of(lambda key: getattr(config, key, None), i) for i in range(len(modules)))
    blocks = tuple(
        tuple(_linear(block, config, family, block_key(i), stage, part) for stage, part in _parts(own))
        for i, (block, own) in enumerate(zip(modules, stages, strict=True))
    )
    named = _renamed(modules, family)
    canonical = {own: name for name, own in named.items()}
    shapes = {
        canonical.get(name, name): tuple(value.shape)
        for name, value in skeleton.named_parameters(remove_duplicate=False)
    }
    fused = {
        f"{linear.spec.key}.{kind}": (f"{linear.tie}.{kind}", linear.rows)
        for linears in blocks
        for linear in linears
        if linear.tie and linear.rows
        for kind in ("weight", "bias")
        if f"{linear.tie}.{kind}" in shapes
    }
    return Layout(
        blocks=blocks,
        stages=stages,
        wanted=_split(shapes, fused),
        fused=fused,
        fused_rows={key: shapes[key][0] for key, _ in fused.values()},
        named=named,
        stacked=_stacked(blocks, stages, family.experts) if family.experts else {},
        older=_older_names(shapes, family),
        tied=_tied_names(config),
    )


def _parts(stages: tuple[Stage, ...]) -> Iterator[tuple[Stage, Part]]:
    return ((stage, part) for stage in stages for part in stage.linears)


def _linear(block: Any, config: Any, family: Family, prefix: str, stage: Stage, part: Part) -> Linear:
    module = block.get_submodule(part.module)
    rows = part.rows(config) if part.rows else None
    out_features = rows.stop - rows.start if rows else module.out_features
    key, tie = f"{prefix}.{family.canonical(part.name)}", part.fused or part.stack
    return Linear(
        LinearSpec(key, module.in_features, out_features, module.bias is not None),
        stage.input_key,
        part.module,
        rows,
        f"{prefix}.{family.canonical(tie)}" if tie else None,
    )


def _renamed(modules: list[Any], family: Family) -> dict[str, str]:
    """By canonical name, what the module calls a parameter otherwise."""
    found = {}
    for i, block in enumerate(modules if family.renamed else ()):
        for name, _ in block.named_parameters():
            if family.canonical(name) != name:
                found[f"{block_key(i)}.{family.canonical(name)}"] = f"{block_key(i)}.{name}"
    return found


def _stacked(
    blocks: tuple[tuple[Linear, ...], ...], stages: tuple[tuple[Stage, ...], ...], names: Experts
) -> dict[str, Stacked]:
    """Places in `gate_up_proj`, (experts, 2 · width, hidden), the gates' rows first, and `down_proj`."""
    found = {}
    for i, (linears, own) in enumerate(zip(blocks, stages, strict=True)):
        experts = {stage.input_key: stage.expert for stage in own if stage.expert is not None}
        count = len(set(experts.values()))
        for linear in linears:
            if (expert := experts.get(linear.stage)) is None:
                continue
            name, rows, cols = (
                linear.module.rpartition(".")[2],
                linear.spec.out_features,
                linear.spec.in_features,
            )
            start, whole = {names.gate: (0, 2), names.up: (rows, 2), names.down: (0, 1)}[name]
            key = f"{block_key(i)}.{EXPERTS}.{'down_proj' if whole == 1 else 'gate_up_proj'}"
            place = Stacked(key, (count, whole * rows, cols), expert, slice(start, start + rows))
            found[f"{linear.spec.key}.weight"] = place
    return found


def _split(
    shapes: Mapping[str, tuple[int, ...]], fused: Mapping[str, tuple[str, slice]]
) -> dict[str, tuple[int, ...]]:
    """Shapes with each fused tensor replaced, where it stood, by its parts."""
    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, (key, rows) in fused.items():
        parts.setdefault(key, {})[name] = (rows.stop - rows.start, *shapes[key][1:])
    wanted: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        wanted.update(parts.get(name, {name: shape}))
    return wanted


def _older_names(shapes: Mapping[str, tuple[int, ...]], family: Family) -> dict[str, str]:
    older = {}
    for name in shapes:
        for new, old in family.stored_names.items():
            if f".{new}." in name:
                older[name] = name.replace(f".{new}.", f".{old}.")
    return older


def _tied_names(config: Any) -> dict[str, str]:
    if not config.tie_word_embeddings:
        return {}
    head, embedding = f"{HEAD_KEY}.weight", f"{EMBEDDING_KEY}.weight"
    return {head: embedding, embedding: head}
