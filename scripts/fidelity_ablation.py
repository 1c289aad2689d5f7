"""What each method is worth: the KL divergence with everything beside that without it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import NamedTuple

from exlq.errors import ConfigError
from exlq.pipeline.config import ConvertConfig
from scripts.fidelity_bench import Bench
from scripts.fidelity_opponents import Stock


class Target(NamedTuple):
    """A column of the table."""

    kind: str  # gguf or exl2
    file_size: int | None = None
    bits: float | None = None


def variants(config: ConvertConfig, wanted: str) -> dict[str, ConvertConfig]:
    """The configuration as it is, and with one method the other way: all of them, or those in the list."""
    values = {**asdict(config.methods), "gptq": config.gptq}
    names = list(values) if wanted == "all" else wanted.split(",")
    if unknown := [name for name in names if name not in values]:
        raise ConfigError(f"--ablate {','.join(unknown)}: the methods are {', '.join(values)}")
    changed = {f"{'without' if values[name] else 'with'} {name}": _other(config, name) for name in names}
    return {"everything": config} | changed


def _other(config: ConvertConfig, name: str) -> ConvertConfig:
    if name == "gptq":
        return replace(config, gptq=not config.gptq)
    methods = replace(config.methods, **{name: not asdict(config.methods)[name]})
    return replace(config, methods=methods)


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

        def divergence(config: ConvertConfig, aim: Target) -> float:
            made = bench.ours(replace(config, file_size=aim.file_size, bits=aim.bits), aim.kind)
            if aim.kind == "exl2":
                assert in_torch is not None
                return in_torch(made.path)[text][0].kl_mean
            assert in_llama_cpp is not None
            return in_llama_cpp(made.path, False)[text][0].kl_mean

        everything: list[float] = []
        for name, config in variants(bench.config, wanted).items():
            found = [divergence(config, aim) for aim in aims.values()]
            everything = everything or found
            cells = [f"{kl:.5f} ×{kl / best:.3f}" for kl, best in zip(found, everything, strict=True)]
            yield f"| {name} | {' | '.join(cells)} |"
