"""The linears of a model and the tensors it wants, from the skeleton and the family's declaration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from exlq.models.family import Family, Part, Stage
from exlq.types import LinearSpec

HEAD_KEY = "lm_head"
EMBEDDING_KEY = "model.embed_tokens"
NORM_KEY = "model.norm"


@dataclass(frozen=True)
class Linear:
    """One linear of a block: what it is, which input it sees and where the block computes it.

    `module` is the path inside the block, `rows` the linear's output rows where that module is
    fused, and `tie` then the key that all linears of the module share.
    """

    spec: LinearSpec
    stage: str
    module: str
    rows: slice | None = None
    tie: str | None = None


@dataclass(frozen=True)
class Layout:
    """Every tensor of the model under its canonical name, and the other places it may be stored in.

    `wanted` gives shapes, `fused` maps a split name to the fused one and the rows in it,
    `fused_rows` the whole rows of a fused tensor; `older` and `tied` map to other names.
    """

    blocks: tuple[tuple[Linear, ...], ...]
    wanted: Mapping[str, tuple[int, ...]]
    fused: Mapping[str, tuple[str, slice]]
    fused_rows: Mapping[str, int]
    older: Mapping[str, str]
    tied: Mapping[str, str]


def block_key(index: int) -> str:
    return f"model.layers.{index}"


def layout_of(skeleton: Any, config: Any, family: Family) -> Layout:
    """Lay out a model whose parameters are named as transformers names them."""
    blocks = tuple(
        _linears(block, config, family, block_key(i)) for i, block in enumerate(skeleton.model.layers)
    )
    shapes = {name: tuple(value.shape) for name, value in skeleton.named_parameters(remove_duplicate=False)}
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
        wanted=_split(shapes, fused),
        fused=fused,
        fused_rows={key: shapes[key][0] for key, _ in fused.values()},
        older=_older_names(shapes, family),
        tied=_tied_names(config),
    )


def _linears(block: Any, config: Any, family: Family, prefix: str) -> tuple[Linear, ...]:
    return tuple(
        _linear(block, config, prefix, stage, part) for stage in family.stages for part in stage.linears
    )


def _linear(block: Any, config: Any, prefix: str, stage: Stage, part: Part) -> Linear:
    module = block.get_submodule(part.module)
    rows = part.rows(config) if part.rows else None
    out_features = rows.stop - rows.start if rows else module.out_features
    return Linear(
        LinearSpec(f"{prefix}.{part.name}", module.in_features, out_features, module.bias is not None),
        stage.input_key,
        part.module,
        rows,
        f"{prefix}.{part.fused}" if part.fused else None,
    )


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
