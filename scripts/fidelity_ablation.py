"""What each method is worth: the KL divergence with everything beside that without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, replace
from typing import Any, NamedTuple
from unittest.mock import patch

from torch import Tensor

from exlq.errors import ConfigError
from exlq.formats import gguf_codec
from exlq.formats.gguf_blocks.block import BlockType, Fields
from exlq.formats.gguf_blocks.fit import fit
from exlq.numerics import hessian
from exlq.numerics.hessian import Factor
from exlq.pipeline.config import ConvertConfig
from scripts.fidelity_bench import Bench
from scripts.fidelity_opponents import Stock


class Target(NamedTuple):
    """A column of the table."""

    kind: str  # gguf or exl2
    file_size: int | None = None
    bits: float | None = None


class Variant(NamedTuple):
    """A configuration, and what of the program is another while it is converted."""

    config: ConvertConfig
    patched: Callable[[], AbstractContextManager[Any]] = nullcontext


def variants(config: ConvertConfig, wanted: str) -> dict[str, Variant]:
    """The configuration as it is, and with one method the other way: all of them, or those in the list."""
    others = _others(config)
    names = list(others) if wanted == "all" else wanted.split(",")
    if unknown := [name for name in names if name not in others]:
        raise ConfigError(f"--ablate {','.join(unknown)}: the methods are {', '.join(others)}")
    return {"everything": Variant(config)} | {others[name][0]: others[name][1] for name in names}


def _others(config: ConvertConfig) -> dict[str, tuple[str, Variant]]:
    """By the name of a method, its line in the table and the variant of it."""
    found = {}
    for name, value in asdict(config.methods).items():
        methods = replace(config.methods, **{name: not value})
        line = f"{'without' if value else 'with'} {name}"
        found[name] = (line, Variant(replace(config, methods=methods)))
    return found | {
        "gptq": ("plain rounding, weighted", Variant(replace(config, gptq=False))),
        "random_rows": ("without random_rows", Variant(replace(config, random_share=0.0))),
        "objective": ("objective: output errors", Variant(replace(config, objective="output-error"))),
        "permute_mlp": ("with permute_mlp", Variant(replace(config, permute_mlp=True))),
        "act_order": ("without act_order", Variant(config, _unordered)),
        "scale_search": ("scales fitted to weights alone (GGUF)", Variant(config, _unweighted_scales)),
    }


def _unordered() -> AbstractContextManager[Any]:
    """Channels are rounded as they stand."""
    factor = hessian.factor

    def as_they_stand(matrix: Tensor, damping: float = hessian.DAMPING, act_order: bool = True) -> Factor:
        return factor(matrix, damping, act_order=False)

    return patch.object(hessian, "factor", as_they_stand)


def _unweighted_scales() -> AbstractContextManager[Any]:
    """K-quants' scales are fitted as if all channels counted alike; the sweep still knows H."""

    def unweighted(kind: BlockType, weight: Tensor, importance: Tensor | None, *, search: str) -> Fields:
        return fit(kind, weight, None, search=search)

    return patch.object(gguf_codec, fit.__name__, unweighted)


def targets(bench: Bench, recipes: Sequence[str], bits: Sequence[float]) -> dict[str, Target]:
    """GGUF at the sizes of stock's recipes, EXL2 at bits per weight."""
    stock = Stock(bench)
    gguf = {name: Target("gguf", file_size=stock.made(name).bytes) for name in recipes}
    return gguf | {f"EXL2 {b:g}": Target("exl2", bits=b) for b in bits}


def ablation(bench: Bench, wanted: str, aims: Mapping[str, Target]) -> Iterator[str]:
    """The table's lines, of the first text: KL of the weights, and how many times that of everything."""
    text = next(iter(bench.texts))
    yield f"| methods | {' | '.join(aims)} |\n|---|{'--:|' * len(aims)}"
    with ExitStack() as held:
        formats = {aim.kind for aim in aims.values()}
        in_llama_cpp = held.enter_context(bench.in_llama_cpp()) if "gguf" in formats else None
        in_torch = held.enter_context(bench.in_torch()) if "exl2" in formats else None

        def divergence(variant: Variant, aim: Target) -> float:
            config = replace(variant.config, file_size=aim.file_size, bits=aim.bits)
            with variant.patched():
                made = bench.ours(config, aim.kind)
            if aim.kind == "exl2":
                assert in_torch is not None
                return in_torch(made.path)[text][0].kl_mean
            assert in_llama_cpp is not None
            return in_llama_cpp(made.path, False)[text][0].kl_mean

        everything: list[float] = []
        for name, variant in variants(bench.config, wanted).items():
            found = [divergence(variant, aim) for aim in aims.values()]
            everything = everything or found
            cells = [f"{kl:.5f} ×{kl / best:.3f}" for kl, best in zip(found, everything, strict=True)]
            yield f"| {name} | {' | '.join(cells)} |"
