"""How the linears of one model are rounded for good, and which of them are already."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from exlq.errors import VerifyError
from exlq.formats.codec import Codec
from exlq.pipeline import kinds, units
from exlq.pipeline.plan import Plan
from exlq.pipeline.sensitivity import Sensitivity
from exlq.pipeline.tensor_cache import Kept, TensorCache, basis, bytes_hash, hashed, names
from exlq.pipeline.workers import Handle, Unit
from exlq.types import LinearSpec, Option

Stored = tuple[LinearSpec, Mapping[str, Tensor]]

NOTHING_KEPT = TensorCache(None)


@dataclass(frozen=True)
class Rounding:
    """How the linears of one model are rounded for good."""

    plan: Plan
    codec: Codec[Any]
    options: Mapping[str, Option]
    sensitivity: Sensitivity | None = None  # None: errors are not handed on between rows
    cache: TensorCache = NOTHING_KEPT
    # told of every linear how often its damping was raised, how many of its input channels are dead, and
    # how many tokens it has of its own, where it is an expert's and they are few
    note: Callable[[str, int, int, int | None], None] = lambda key, raised, dead, reached: None

    @property
    def follows_base(self) -> bool:
        """Whether the base model runs beside the quantized one."""
        methods = self.plan.config.methods
        return self.plan.config.gptq and (methods.input_correction or methods.residual_correction)

    def unit(self, spec: LinearSpec, factor: Handle, drift: Handle) -> Unit:
        """One linear rounded."""
        profile = self.plan.profile
        weight, option = self.plan.model.linear_weight(spec.key), self.options[spec.key]
        coupling = None
        if self.sensitivity is not None:
            with profile.spent(kinds.COUPLING):
                coupling = self.sensitivity.coupling(spec.key, self.plan.model.device)
        given = (self.codec, spec, option, weight, factor, drift, coupling, profile)
        return Unit(units.rounded, given)

    def keep(self, spec: LinearSpec, name: str, found: Kept, reached: int | None = None) -> Stored:
        """One linear's stored tensors, kept as `name`.

        `reached` is the number of its own tokens, where it is an expert's that has few.
        """
        with self.plan.profile.spent(kinds.WRITING):
            self.cache.write(name, found._replace(reached=reached))
        self.note(spec.key, found.raised, found.dead, reached)
        return spec, found.tensors


@dataclass(frozen=True)
class Route:
    """What of a pass is in the cache, and what is to be done."""

    names: Mapping[str, str]  # of every linear's tensors in the cache
    places: Sequence[str]  # what is quantized before each block, and before the head
    lacking: Sequence[int]  # blocks with a linear that is not in the cache; their number for the head

    @classmethod
    def of(cls, rounding: Rounding, embedding: Tensor | None) -> Route:
        plan, cache = rounding.plan, rounding.cache
        begin = hashed(
            basis(plan, rounding.codec.name), None if embedding is None else bytes_hash(embedding.cpu())
        )
        found, places = names(plan, rounding.options, begin)
        stages = [[linear.spec.key for linear in plan.model.linears(i)] for i in range(plan.model.n_blocks)]
        stages.append([plan.model.head.key] if plan.model.head.key in found else [])
        lacking = [i for i, keys in enumerate(stages) if not all(cache.has(found[key]) for key in keys)]
        return cls(found, places, lacking)

    def found(self, rounding: Rounding, spec: LinearSpec) -> Stored | None:
        """A linear's tensors from the cache, if they are there."""
        kept = rounding.cache.read(self.names[spec.key])
        if kept is None:
            return None
        rounding.note(spec.key, kept.raised, kept.dead, kept.reached)
        return spec, kept.tensors

    def kept(self, rounding: Rounding, spec: LinearSpec) -> Stored:
        """A linear's tensors from the cache.

        Raises:
            VerifyError: if they are no longer what was put there.
        """
        found = self.found(rounding, spec)
        if found is None:
            rounding.cache.drop(self.names[spec.key])
            raise VerifyError(f"{spec.key} was damaged on the disk since it was quantized: run again")
        return found
