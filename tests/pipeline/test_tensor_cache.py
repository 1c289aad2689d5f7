"""What was quantized is not quantized again, and never taken for something else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from exlq.errors import VerifyError
from exlq.formats.exl2_codec import Exl2Codec
from exlq.models.block import Block
from exlq.models.model import Model
from exlq.numerics.hessian import HessianSum
from exlq.pipeline import job, trial, verify
from exlq.pipeline.config import ConvertConfig, Methods
from exlq.pipeline.plan import make_plan
from exlq.pipeline.progress import silent
from exlq.pipeline.quantize import quantized_linears
from exlq.pipeline.rounding import Rounding
from exlq.pipeline.tensor_cache import Kept, TensorCache, basis, names
from exlq.types import Option
from exlq.workspace import Workspace
from tests.pipeline.conftest import Finished
from tests.pipeline.helpers import Events, block_is_read, contents, convert, write_ids


@pytest.fixture
def rounded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keys of the matrices that are rounded for good from here on."""
    seen: list[str] = []
    real = trial.quantize

    def counting(codec: Any, spec: Any, *rest: Any) -> Any:
        seen.append(spec.key)
        return real(codec, spec, *rest)

    monkeypatch.setattr(trial, "quantize", counting)
    return seen


@pytest.fixture
def config(finished: Finished, tmp_path: Path) -> ConvertConfig:
    """The finished conversion elsewhere, with its measurement."""
    return replace(finished.config, out_dir=tmp_path / "out", measurement=finished.measurement)


def allocation(summary: dict[str, Any]) -> dict[str, str]:
    return dict(summary["outputs"]["exl2"]["allocation"])


STAGES = [["q", "k", "v"], ["o"], ["gate", "up"], ["down"]]


def stages() -> list[list[str]]:
    """Keys in the order of the second pass, those together that share an input."""
    part = {"q": "self_attn", "k": "self_attn", "v": "self_attn", "o": "self_attn"}
    return [
        [f"model.layers.{index}.{part.get(name, 'mlp')}.{name}_proj" for name in stage]
        for index in range(2)
        for stage in STAGES
    ] + [["lm_head"]]


def expected(old: dict[str, str], new: dict[str, str]) -> list[str]:
    """What changed in the first stage that changed at all, and all that comes after."""
    different = [any(old[key] != new[key] for key in stage) for stage in stages()]
    first = different.index(True)
    begin = [key for key in stages()[first] if old[key] != new[key]]
    return begin + [key for stage in stages()[first + 1 :] for key in stage]


def test_another_target_redoes_what_comes_after_the_first_change(
    config: ConvertConfig, finished: Finished, rounded: list[str], tmp_path: Path
) -> None:
    old = convert(replace(config, bits=4.0))
    assert len(rounded) == 15
    rounded.clear()
    new = convert(replace(config, bits=4.2))
    wanted = expected(allocation(old), allocation(new))
    assert rounded == wanted
    assert len(wanted) > 0
    alone = convert(replace(config, bits=4.2, out_dir=tmp_path / "alone"))
    assert contents(config.out_dir / "exl2") == contents(tmp_path / "alone" / "exl2")
    assert allocation(alone) == allocation(new)


@pytest.mark.parametrize("changed", ["0.self_attn.k", "0.mlp.gate", "1.self_attn.o", "1.mlp.down"])
def test_only_what_comes_after_a_changed_linear_is_rounded_again(
    finished: Finished, rounded: list[str], tmp_path: Path, changed: str
) -> None:
    plan, codec = make_plan(finished.config), Exl2Codec()
    key = f"model.layers.{changed}_proj"
    options = {spec.key: codec.options(spec)[3] for spec in plan.linears}
    options |= {"lm_head": codec.head_option(plan.model.head, 6)}
    other = {**options, key: codec.options(plan.specs[key])[0]}

    def made(options: dict[str, Option], cache: TensorCache) -> dict[str, str]:
        rounded.clear()
        workspace = Workspace(tmp_path)
        found = quantized_linears(Rounding(plan, codec, options, cache=cache), workspace, silent)
        return {spec.key: verify.digest(tensors) for spec, tensors in found}

    cache = TensorCache(tmp_path / "tensors")
    first = made(options, cache)
    second = made(other, cache)
    begin = next(index for index, stage in enumerate(stages()) if key in stage)
    assert rounded == [key, *(each for stage in stages()[begin + 1 :] for each in stage)]
    assert made(other, TensorCache(None)) == second
    assert made(options, cache) == first
    assert rounded == [], "what was made first is still there"
    assert not (tmp_path / "states.json").exists()


def test_the_same_conversion_again_reads_no_block_but_to_compare(
    config: ConvertConfig, rounded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(config)
    old = contents(config.out_dir / "exl2")
    (config.out_dir / "summary.json").unlink()
    rounded.clear()
    monkeypatch.setattr(Block, "staged", block_is_read)
    convert(config)
    assert rounded == []
    assert contents(config.out_dir / "exl2") == old


def test_the_same_conversion_elsewhere_rounds_everything(
    config: ConvertConfig, rounded: list[str], tmp_path: Path
) -> None:
    convert(config)
    convert(replace(config, out_dir=tmp_path / "other"))
    assert len(rounded) == 30


@pytest.mark.parametrize(("block", "left"), [(1, 8), (2, 1)])
def test_an_interrupted_pass_goes_on_after_its_last_block(
    config: ConvertConfig,
    finished: Finished,
    rounded: list[str],
    monkeypatch: pytest.MonkeyPatch,
    block: int,
    left: int,
) -> None:
    with pytest.raises(KeyboardInterrupt):
        convert(config, Events(("quantizing exl2", block)))
    rounded.clear()
    opened: list[int] = []
    real = Block.staged

    def watched(self: Block, *rest: Any, **named: Any) -> Any:
        opened.append(1)
        return real(self, *rest, **named)

    monkeypatch.setattr(Block, "staged", watched)
    convert(config)
    assert len(rounded) == left
    assert len(opened) == 2 * (2 - block), "of the quantized and the base model"
    assert contents(config.out_dir / "exl2") == contents(finished.model)


def test_states_that_are_gone_are_made_anew_without_rounding_again(
    config: ConvertConfig, finished: Finished, rounded: list[str]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        convert(config, Events(("quantizing exl2", 1)))
    for path in (config.out_dir / "work").glob("*.bin"):
        path.unlink()
    rounded.clear()
    convert(config)
    assert len(rounded) == 8
    assert contents(config.out_dir / "exl2") == contents(finished.model)


def test_a_stage_that_is_all_there_has_no_hessian_taken(
    config: ConvertConfig, finished: Finished, rounded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = trial.quantize
    with monkeypatch.context() as patched:

        def stopping(codec: Any, spec: Any, *rest: Any) -> Any:
            if spec.key == "model.layers.0.mlp.up_proj":
                raise KeyboardInterrupt
            return real(codec, spec, *rest)

        patched.setattr(trial, "quantize", stopping)
        with pytest.raises(KeyboardInterrupt):
            convert(config)
    rounded.clear()
    sums: list[int] = []
    zeros = HessianSum.zeros

    def counted(in_features: int, device: torch.device) -> HessianSum:
        sums.append(in_features)
        return zeros(in_features, device)

    monkeypatch.setattr(HessianSum, "zeros", counted)
    convert(config)
    assert rounded[0] == "model.layers.0.mlp.up_proj"
    assert len(sums) == 7, "of the last two inputs of the first block, four of the second, the head's"
    assert contents(config.out_dir / "exl2") == contents(finished.model)


def damaged(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def test_a_byte_changed_on_the_disk_is_noticed(config: ConvertConfig, finished: Finished) -> None:
    with pytest.raises(KeyboardInterrupt):
        convert(config, Events(("quantizing exl2", 1)))
    for path in (config.out_dir / "work" / "tensors").iterdir():
        damaged(path)
    with pytest.raises(VerifyError, match=r"layers.0.self_attn.q_proj was damaged .* run again"):
        convert(config)
    convert(config)
    assert contents(config.out_dir / "exl2") == contents(finished.model)


def test_what_is_kept_comes_back_and_a_truncated_file_does_not(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path / "tensors")
    tensors = {"a": torch.arange(6, dtype=torch.int16).view(2, 3), "b": torch.rand(4).half()}
    cache.write("x", Kept(tensors, raised=2, dead=7))
    found = cache.read("x")
    assert found is not None
    assert (found.raised, found.dead, found.tensors.keys()) == (2, 7, tensors.keys())
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in tensors.items())
    assert found.reached is None
    cache.write("x", Kept(tensors, reached=0))
    assert getattr(cache.read("x"), "reached", None) == 0
    assert cache.read("y") is None
    (path,) = (tmp_path / "tensors").iterdir()
    path.write_bytes(path.read_bytes()[:-3])
    assert cache.read("x") is None
    nowhere = TensorCache(None)
    nowhere.write("x", found)
    assert not nowhere.has("x")


CHANGES: dict[str, Callable[[ConvertConfig, Path], ConvertConfig]] = {
    "text": lambda c, place: replace(c, calibration=write_ids(place / "other.parquet", seed=1)),
    "seed": lambda c, _: replace(c, seed=1),
    "rows": lambda c, _: replace(c, rows=23),
    "measured rows": lambda c, _: replace(c, measurement_rows=23),
    "random rows": lambda c, _: replace(c, random_share=0.5),
    "states": lambda c, _: replace(c, states="bf16"),
    "rounding": lambda c, _: replace(c, gptq=False),
    "objective": lambda c, _: replace(c, objective="output-error"),
    "channels": lambda c, _: replace(c, permute_mlp=True),
    "methods": lambda c, _: replace(c, methods=Methods(descent=False)),
}


def test_whatever_levels_depend_on_is_in_the_name(finished: Finished, tmp_path: Path) -> None:
    found = {
        "exl2": basis(make_plan(finished.config), "exl2"),
        "gguf": basis(make_plan(finished.config), "gguf"),
    }
    for name, change in CHANGES.items():
        found[name] = basis(make_plan(change(finished.config, tmp_path)), "exl2")
    assert len(set(found.values())) == len(found), "two of these would be taken for one another"
    same = replace(finished.config, bits=3.0, out_dir=tmp_path, shard_mib=1, compile_full=tmp_path / "x")
    assert basis(make_plan(same), "exl2") == found["exl2"]


def test_names_tell_what_comes_before_apart_but_not_what_shares_an_input(finished: Finished) -> None:
    plan = make_plan(finished.config)
    options = {spec.key: Option("a", {"bits": [4]}) for spec in (*plan.linears, plan.model.head)}
    first, places = names(plan, options, "begin")
    assert len(set(first.values())) == 15
    assert len(set(places)) == 3
    changed, other = names(
        plan, {**options, "model.layers.0.self_attn.k_proj": Option("b", {"bits": [3]})}, "begin"
    )
    same = {key for key in first if first[key] == changed[key]}
    assert same == {"model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"}
    assert (places[0], set(places) & set(other)) == (other[0], {places[0]})


def test_clean_leaves_nothing_that_is_large(config: ConvertConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(config)
    convert(replace(config, no_resume=True))
    assert (config.out_dir / "work.old-1" / "tensors").exists()
    done = job.finished_summary(config)
    assert done is not None
    assert done["kept_bytes"] > 100_000
    monkeypatch.setattr(Model, "block", block_is_read)
    assert job.finished_summary(replace(config, clean=True)) is not None
    assert job.cleaned(config, done)["kept_bytes"] == 0
    assert [path.name for path in (config.out_dir / "work").iterdir()] == ["job.json"]
    assert not (config.out_dir / "work.old-1").exists()
