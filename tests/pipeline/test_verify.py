"""What was written is read again: any other byte is found, and so is a model that predicts badly."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from exlq.errors import VerifyError
from exlq.formats.exl2_directory import Exl2Weights
from exlq.models.model import Model
from exlq.models.open import open_model
from exlq.pipeline.plan import make_plan
from exlq.pipeline.verify import digest, judge, verify_exl2, verify_model
from exlq.workspace import Workspace
from tests.models.conftest import opened
from tests.pipeline.conftest import Finished, TinyMaker
from tests.pipeline.helpers import SUFFIXES, convert, copied, edit_tensors, settings

KEY = "model.layers.1.self_attn.k_proj"
STORED = [
    *(f"{KEY}.{suffix}" for suffix in (*SUFFIXES, "bias")),
    "lm_head.q_weight",
    "model.embed_tokens.weight",
    "model.norm.weight",
    "model.layers.0.input_layernorm.weight",
]


@pytest.fixture(scope="module")
def written(tiny: TinyMaker, ids_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A model with biases at 6 bits per weight."""
    out = tmp_path_factory.mktemp("written") / "out"
    config = settings(tiny("qwen2", False), out, ids_file)
    return Finished(config, convert(config))


@pytest.fixture(scope="module")
def source(written: Finished) -> Model:
    return opened(written.config.in_dir)


@pytest.fixture(scope="module")
def digests(written: Finished) -> Mapping[str, str]:
    """As the five tensors read by safetensors alone give them."""
    linears: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(written.model / "output.safetensors").items():
        key, _, suffix = name.rpartition(".")
        if suffix in SUFFIXES:
            linears.setdefault(key, {})[suffix] = tensor
    assert len(linears) == 15
    return {key: digest(tensors) for key, tensors in linears.items()}


def exl2_model(directory: Path) -> Model:
    return open_model(directory, Exl2Weights(directory), device=torch.device("cpu"))


def flipped(directory: Path, name: str) -> None:
    """One bit of one tensor's last byte, changed in the file itself; where it lies its header says."""
    path = directory / "output.safetensors"
    data = bytearray(path.read_bytes())
    header = int.from_bytes(data[:8], "little")
    _, stop = json.loads(data[8 : 8 + header])[name]["data_offsets"]
    data[8 + header + stop - 1] ^= 1
    path.write_bytes(data)


def test_what_was_written_passes(written: Finished, source: Model, digests: Mapping[str, str]) -> None:
    verify_exl2(source, written.model, digests)


@pytest.mark.parametrize("name", STORED)
def test_one_flipped_bit_is_found_and_its_tensor_named(
    written: Finished, source: Model, digests: Mapping[str, str], tmp_path: Path, name: str
) -> None:
    directory = copied(written.model, tmp_path / "exl2")
    flipped(directory, name)
    named = name.rpartition(".")[0] if "model.layers.1" in name or "lm_head" in name else name
    with pytest.raises(VerifyError, match=named):
        verify_exl2(source, directory, digests)


@pytest.mark.parametrize("name", [f"{KEY}.q_weight", f"{KEY}.bias", "model.norm.weight"])
def test_a_tensor_that_is_not_there_is_found(
    written: Finished, source: Model, digests: Mapping[str, str], tmp_path: Path, name: str
) -> None:
    directory = copied(written.model, tmp_path / "exl2")
    tensors = load_file(directory / "output.safetensors")
    del tensors[name]
    save_file(tensors, directory / "output.safetensors")
    with pytest.raises(VerifyError, match=name.removesuffix(".bias")):
        verify_exl2(source, directory, digests)


def test_a_file_cut_short_is_found(
    written: Finished, source: Model, digests: Mapping[str, str], tmp_path: Path
) -> None:
    directory = copied(written.model, tmp_path / "exl2")
    path = directory / "output.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(VerifyError, match="cannot be read back"):
        verify_exl2(source, directory, digests)


def test_a_digest_depends_on_names_dtypes_shapes_and_bytes_but_not_on_order() -> None:
    a, b = torch.arange(6, dtype=torch.int16), torch.ones(2)
    wanted = digest({"a": a, "b": b})
    assert digest({"b": b, "a": a.clone()}) == wanted
    others = [
        {"a": a.view(2, 3), "b": b},
        {"a": a.view(torch.float16), "b": b},
        {"c": a, "b": b},
        {"a": a},
        {"a": a + 1, "b": b},
    ]
    assert wanted not in {digest(other) for other in others}
    assert digest({"a": a.view(2, 3).T}) == digest({"a": a.view(2, 3).T.contiguous()})


def test_logits_that_are_not_finite_are_found(written: Finished, tmp_path: Path) -> None:
    directory = copied(written.model, tmp_path / "exl2")
    norm = load_file(directory / "output.safetensors")["model.layers.1.input_layernorm.weight"]
    norm[3] = float("inf")
    edit_tensors(directory / "output.safetensors", model__layers__1__input_layernorm__weight=norm)
    with pytest.raises(VerifyError, match=r"cannot be run: .* has inf at row 3"):
        verify_model(make_plan(written.config), exl2_model(directory), Workspace(tmp_path))


def test_a_tensor_that_was_not_written_is_found(
    written: Finished, source: Model, digests: Mapping[str, str], tmp_path: Path
) -> None:
    directory = copied(written.model, tmp_path / "exl2")
    tensors = load_file(directory / "output.safetensors")
    tensors["model.layers.7.input_layernorm.weight"] = torch.ones(64, dtype=torch.float16)
    save_file(tensors, directory / "output.safetensors")
    with pytest.raises(VerifyError, match=r"holds model\.layers\.7.* which was not written"):
        verify_exl2(source, directory, digests)


def test_its_figures_are_of_held_out_rows(written: Finished, tmp_path: Path) -> None:
    plan = make_plan(written.config)
    found = verify_model(plan, exl2_model(written.model), Workspace(tmp_path))
    assert (found.n_chunks, found.context) == (3, 64)
    assert found.kl_mean == written.summary["outputs"]["exl2"]["evaluation"]["kl_mean"]
    assert 0 < found.kl_mean < 0.01


@pytest.mark.parametrize(
    ("predicted", "measured", "trusted"),
    [
        (0.001, 0.0499, True),
        (0.001, 0.0501, False),
        (0.1, 0.499, True),
        (0.1, 0.501, False),
        (0.0, 0.051, False),
        (None, 0.0499, True),
        (None, 0.0501, False),
    ],
)
def test_a_divergence_is_trusted_up_to_a_twentieth_or_five_times_the_predicted(
    predicted: float | None, measured: float, trusted: bool
) -> None:
    assert passes(predicted, measured, True) == trusted


@pytest.mark.parametrize(
    ("predicted", "measured", "trusted"),
    [
        (0.01, 0.499, True),
        (0.01, 0.501, False),
        (0.1, 0.999, True),
        (0.1, 1.001, False),
        (None, 2.28, True),  # 0.3 ln(2048)
        (None, 2.29, False),
    ],
)
def test_at_few_bits_it_is_trusted_up_to_a_half_or_ten_times_or_a_part_of_knowing_nothing(
    predicted: float | None, measured: float, trusted: bool
) -> None:
    assert passes(predicted, measured, False) == trusted


@pytest.mark.parametrize("predicted", [None, 0.01])
@pytest.mark.parametrize("many_bits", [True, False])
def test_what_is_no_number_is_never_trusted(predicted: float | None, many_bits: bool) -> None:
    assert not passes(predicted, float("nan"), many_bits)
    assert not passes(predicted, float("inf"), many_bits)


def passes(predicted: float | None, measured: float, many_bits: bool) -> bool:
    """Whether `judge` lets it pass; where it does not, its message says what was measured."""
    try:
        judge(predicted, measured, many_bits, vocab_size=2048)
    except VerifyError as exc:
        return f"KL divergence {measured:.4f}, at most" not in str(exc)
    return True
