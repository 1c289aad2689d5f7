"""The fidelity benchmark's tables, texts and list of methods."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from exlq.errors import ConfigError
from exlq.evaluation.divergence import Divergence
from exlq.formats import gguf_codec
from exlq.formats.gguf_blocks.kquants import Q4_K
from exlq.numerics import hessian
from exlq.pipeline.config import ConvertConfig, Methods
from scripts import fidelity_tables
from scripts.fidelity_ablation import variants
from scripts.fidelity_bench import Made, Scores
from scripts.fidelity_tables import Pair
from scripts.fidelity_texts import MOST_CHARACTERS, python_text


def scores(kl: float) -> Scores:
    found = Divergence(100, 2, 16, 40.0, 41.0, kl, 0.0, kl, kl, 0.9, 0.0)
    return {"text": (found, found)}


def pair(label: str, size: int, theirs: float) -> Pair:
    """Ours has a KL of exp(-size/1000)."""
    made = Made(Path(), size, size / 1000, 8000, 1.0)
    return Pair(label, (made, made), (scores(theirs), scores(math.exp(-size / 1000))))


def test_bytes_at_equal_divergence_lie_on_the_curve_of_ours() -> None:
    pairs = [pair("large", 6000, math.exp(-5.1)), pair("middle", 4000, math.exp(-3.5))]
    pairs += [pair("small", 3000, math.exp(-2.75))]
    lines = fidelity_tables.saved(pairs, "text")
    assert lines == [
        "| large | 0.00610 | 6,000 | 5,100 | 15.0 % | 0.900 |",
        "| middle | 0.03020 | 4,000 | 3,500 | 12.5 % | 0.500 |",
        "| small | 0.06393 | 3,000 | ~2,750 | ~8.3 % | ~0.250 |",
    ]


def test_a_line_has_as_many_cells_as_the_heading() -> None:
    line = fidelity_tables.line(pair("one", 1000, 0.5), "text")
    heading, rule = fidelity_tables.heading("recipe", "stock", "gguf").splitlines()
    assert line.count("|") == heading.count("|") == rule.count("|")
    assert "| 0.50000 | 0.36788 | 0.74 |" in line


@pytest.mark.parametrize("name", [each.name for each in fields(Methods)])
def test_every_method_is_left_out_once_and_alone(name: str) -> None:
    config = ConvertConfig(Path("in"), Path("out"), bits=4.0)
    found = variants(config, "all")
    changed = [v for v in found.values() if getattr(v.config.methods, name) != getattr(config.methods, name)]
    assert len(changed) == 1
    assert list(variants(config, name)) == ["everything", next(n for n in found if n.endswith(f" {name}"))]


def test_every_other_line_differs_from_everything_in_one_thing() -> None:
    config = ConvertConfig(Path("in"), Path("out"), bits=4.0)
    found = variants(config, "all")
    assert len(found) == len(fields(Methods)) + 7
    for name, variant in found.items():
        settings = variant.config.as_json()
        changed = [key for key, value in config.as_json().items() if settings[key] != value]
        patched = variant.patched is not found["everything"].patched
        assert len(changed) + patched == (name != "everything"), name


def test_what_is_patched_is_used_and_put_back() -> None:
    found = variants(ConvertConfig(Path("in"), Path("out"), bits=4.0), "act_order,scale_search")
    diagonal = torch.tensor([1.0, 3.0, 2.0])
    with found["without act_order"].patched():
        assert hessian.factor(diagonal.diag()).perm.tolist() == [0, 1, 2]
    assert hessian.factor(diagonal.diag()).perm.tolist() == [1, 2, 0]
    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    importance = torch.linspace(0.1, 30, 256)
    weighted = gguf_codec._fitted(Q4_K, weight, importance, "fast").scale
    with found["scales fitted to weights alone (GGUF)"].patched():
        unweighted = gguf_codec._fitted(Q4_K, weight, importance, "fast").scale
    assert torch.equal(unweighted, gguf_codec._fitted(Q4_K, weight, torch.ones(256), "fast").scale)
    assert not torch.equal(unweighted, weighted)


def test_an_unknown_method_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"--ablate magic: the methods are descent, .*gptq"):
        variants(ConvertConfig(Path("in"), Path("out"), bits=4.0), "descent,magic")


def test_the_other_text_is_code_and_documentation_of_bounded_length_and_always_the_same(
    tmp_path: Path,
) -> None:
    cells = pq.read_table(python_text(tmp_path / "a.parquet"))["text"].to_pylist()
    assert cells == pq.read_table(python_text(tmp_path / "b.parquet"))["text"].to_pylist()
    assert MOST_CHARACTERS - 4000 < sum(map(len, cells)) <= MOST_CHARACTERS
    assert sum("def " in cell for cell in cells[::2]) > len(cells) // 4
    assert sum("self." in cell for cell in cells[1::2]) < len(cells) // 8
