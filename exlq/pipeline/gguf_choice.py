"""The types of a GGUF file's matrices, by what was asked for: bits a weight, bytes in all, or a recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from exlq.errors import TargetError
from exlq.formats.codec import Codec
from exlq.formats.gguf.overrides import Overrides, pinned_types
from exlq.formats.gguf.recipes import Recipe, Shape, fallback, recipe_types
from exlq.formats.gguf.tensors import Entry
from exlq.formats.gguf_codec import holds, type_option
from exlq.measurement import Measurement
from exlq.pipeline.allocate import Choice, measured_loss, recipe_options, records, solved, total_loss
from exlq.pipeline.plan import Plan
from exlq.recipes.ends import gguf_ends
from exlq.recipes.stored import RecipeOutput
from exlq.types import Allocation, Option

ALIGNMENT_BYTES = 32  # of a tensor's data in the file
WIDER = ("Q8_0", "BF16")  # for weights too small for what they were to be


@dataclass(frozen=True)
class Matrices:
    """The matrices of the file, and the types given to some of them by hand."""

    plan: Plan
    codec: Codec[Any]
    entries: tuple[Entry, ...]
    overrides: Overrides

    @cached_property
    def keys(self) -> dict[str, str]:
        """The tensor that holds each matrix of the model, by the matrix's key."""
        return {
            source.removesuffix(".weight"): entry.name
            for entry in self.entries
            if entry.matrix
            for source in entry.sources
        }

    @cached_property
    def pinned(self) -> tuple[dict[str, Option], tuple[str, ...]]:
        """Options given by hand, by the matrix's key, and what had to be given instead."""
        types = pinned_types(self.overrides, self.entries)
        return self.held({key: type_option(types[name]) for key, name in self.keys.items() if name in types})

    def held(self, options: Mapping[str, Option]) -> tuple[dict[str, Option], tuple[str, ...]]:
        """The options, wider ones for matrices too small for the float16 steps of theirs; what changed."""
        held, notes = dict(options), []
        by_tensor: dict[str, list[str]] = {}
        for key in options:
            by_tensor.setdefault(self.keys[key], []).append(key)
        for name, keys in by_tensor.items():
            wanted, model = options[keys[0]].qparams["type"], self.plan.model
            kept: tuple[str, ...] = (wanted, *WIDER)
            for key in keys:
                weight = model.linear_weight(key)
                kept = tuple(kind for kind in kept if holds(kind, weight))
            if kept[0] != wanted:
                held |= {key: type_option(kept[0]) for key in keys}
                notes.append(f"{name} is {kept[0]}: its weights are too small for the steps of {wanted}")
        return held, tuple(notes)

    def bits(self, options: Mapping[str, Option]) -> int:
        """Stored bits of matrices."""
        return sum(self.codec.storage_bits(self.plan.specs[key], option) for key, option in options.items())

    def decoder(self, options: Mapping[str, Option]) -> dict[str, Option]:
        return {spec.key: options[spec.key] for spec in self.plan.linears if spec.key in options}

    def chosen(
        self,
        options: Mapping[str, Option],
        measurement: Measurement | None,
        allocation: Allocation | None = None,
        notes: tuple[str, ...] = (),
    ) -> Choice:
        losses: list[float | None] = [None]
        if measurement is not None and self.plan.config.objective == "kl":
            losses = [measured_loss(measurement, key, option) for key, option in options.items()]
        bpw = self.bits(self.decoder(options)) / self.plan.numel
        return Choice(options, bpw, total_loss(losses), allocation, notes)


def within_bits(matrices: Matrices, measurement: Measurement, bits: float) -> Choice:
    """The decoder's linears within `bits` a weight; embedding and head by rule."""
    plan = matrices.plan
    pins, pinned_notes = matrices.pinned
    free = [spec.key for spec in plan.linears if spec.key not in pins]
    budget = int(bits * plan.numel) - matrices.bits(matrices.decoder(pins))
    allocation, options = solved(plan, matrices.codec, measurement, free, budget)
    ends, notes = matrices.held(_ends(matrices, bits))
    return matrices.chosen({**options, **ends, **pins}, measurement, allocation, pinned_notes + notes)


def bits_range(matrices: Matrices) -> tuple[float, float]:
    """Bits per weight that the decoder's linears can have, with what is given by hand."""
    plan, pins = matrices.plan, matrices.pinned[0]
    sizes = [
        [matrices.codec.storage_bits(spec, option) for option in _options(matrices, spec.key, pins)]
        for spec in plan.linears
    ]
    return sum(map(min, sizes)) / plan.numel, sum(map(max, sizes)) / plan.numel


def within_bytes(
    matrices: Matrices,
    measurement: Measurement,
    size: int,
    file_bytes: Callable[[Mapping[str, Option]], int],
) -> Choice:
    """All matrices, embedding and head too, so that the file has at most `size` bytes.

    Args:
        file_bytes: of the whole file, all shards, under a choice.

    Raises:
        TargetError: if the smallest file is larger.
    """
    plan, (pins, notes) = matrices.plan, matrices.pinned
    free, least = [key for key in matrices.keys if key not in pins], smallest(matrices)
    require_size(size, file_bytes(least))
    # What is no matrix takes the same whatever the choice, but for the shards' number and alignment.
    budget = 8 * (size - file_bytes(least)) + matrices.bits({key: least[key] for key in free})
    while True:
        allocation, options = solved(plan, matrices.codec, measurement, free, budget)
        excess = file_bytes({**options, **pins}) - size
        if excess <= 0:
            return matrices.chosen({**options, **pins}, measurement, allocation, notes)
        budget -= 8 * max(excess, ALIGNMENT_BYTES)


def smallest(matrices: Matrices) -> dict[str, Option]:
    """The fewest bits that every matrix can have."""
    pins, _ = matrices.pinned
    return {key: _options(matrices, key, pins)[0] for key in matrices.keys}


def require_size(size: int, smallest: int) -> None:
    if size < smallest:
        raise TargetError(
            f"--file-size {size} bytes: the smallest file of this model has {smallest}; ask for that or more"
        )


def by_recipe(
    matrices: Matrices, measurement: Measurement | None, recipe: Recipe, model: Shape, imatrix: bool
) -> Choice:
    """What llama-quantize gives every tensor."""
    by_hand = pinned_types(matrices.overrides, matrices.entries, recipe)
    types = recipe_types(recipe, matrices.entries, model, imatrix=imatrix, pinned=by_hand)
    options = {key: type_option(types[name]) for key, name in matrices.keys.items()}
    if measurement is not None:
        records(matrices.plan, matrices.codec, measurement, list(options))
    options, notes = matrices.held(options)
    return matrices.chosen(options, measurement, notes=notes)


def by_solved_recipe(matrices: Matrices, measurement: Measurement | None, given: RecipeOutput) -> Choice:
    """What `exlq solve` chose; types given by hand count before it.

    Raises:
        TargetError: if the recipe is not of this model.
    """
    options = recipe_options(matrices.plan, matrices.codec, given, list(matrices.keys))
    by_tensor: dict[str, str] = {}
    for key, name in matrices.keys.items():
        if by_tensor.setdefault(name, options[key].desc) != options[key].desc:
            raise TargetError(f"{matrices.plan.config.recipe}: {key} shares {name} and its type; solve again")
    if measurement is not None:
        records(matrices.plan, matrices.codec, measurement, list(options))
    pins, pinned_notes = matrices.pinned
    held, notes = matrices.held({key: option for key, option in options.items() if key not in pins})
    return matrices.chosen({**options, **held, **pins}, measurement, notes=pinned_notes + notes)


def _options(matrices: Matrices, key: str, pins: Mapping[str, Option]) -> Sequence[Option]:
    """What a matrix may become, fewest bits first."""
    spec = matrices.plan.specs[key]
    return (pins[key],) if key in pins else matrices.codec.measured(spec, matrices.plan.role(spec))


def _ends(matrices: Matrices, bits: float) -> dict[str, Option]:
    """Embedding and head where bits are counted over the decoder alone."""
    model = matrices.plan.model
    ends = gguf_ends(bits, matrices.plan.config.head_bits, model.tied)
    return {key: type_option(fallback(kind, model.hidden_size)) for key, kind in ends.items()}
