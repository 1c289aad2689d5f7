"""Which type each tensor of a GGUF file gets, by target, rule and hand; on made-up measurements."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
from safetensors.torch import load_file

from exlq.errors import MeasurementError, TargetError
from exlq.formats.gguf.overrides import type_file
from exlq.models.model import Model
from exlq.pipeline import job, measured
from exlq.pipeline.config import ConvertConfig
from exlq.pipeline.outputs import make_outputs
from exlq.pipeline.plan import make_plan
from tests.helpers import make_model
from tests.pipeline.conftest import TinyMaker
from tests.pipeline.helpers import (
    Stored,
    block_is_read,
    convert,
    copied,
    edit_tensors,
    file_bytes,
    made_up,
    settings,
)

Types = dict[str, str]
HEADS = {2: "Q2_K", 3: "Q3_K", 4: "Q4_K", 5: "Q5_K", 6: "Q6_K", 8: "Q8_0"}


@pytest.fixture(scope="module")
def config_of(ids_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], ConvertConfig]:
    """A model → a conversion of it to GGUF whose measurement is made up."""
    made: dict[Path, ConvertConfig] = {}

    def config(model: Path) -> ConvertConfig:
        if model not in made:
            place = tmp_path_factory.mktemp("choice")
            plain = settings(model, place / "out", ids_file, formats=("gguf",), measure=None)
            made[model] = replace(plain, measurement=made_up(plain, place / "m.json"))
        return made[model]

    return config


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wide llama whose embedding is its head."""
    place = tmp_path_factory.mktemp("tied") / "tied"
    return make_model("llama", place, tied=True, hidden_size=256, intermediate_size=512)


@pytest.fixture(scope="module")
def phi3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("phi3") / "phi3"
    return make_model("phi3", place, tied=False, hidden_size=256, intermediate_size=512)


def chosen(config: ConvertConfig, **changes: Any) -> dict[str, Any]:
    """The figures of a conversion that is only rehearsed."""
    return job.rehearse(replace(config, **changes))[0]["gguf"]


def ends(figures: dict[str, Any]) -> tuple[str | None, ...]:
    return tuple(figures["types"].get(name) for name in ("token_embd.weight", "output.weight"))


def bpw(figures: dict[str, Any]) -> float:
    """Of the decoder, from types and bytes of tensors alone."""
    sizes = gguf.GGML_QUANT_SIZES
    own = {
        n: figures["tensor_bytes"][n] for n in figures["types"] if n.startswith("blk.") and "norm" not in n
    }
    numel = 0
    for name, n_bytes in own.items():
        block, size = sizes[gguf.GGMLQuantizationType[figures["types"][name]]]
        numel += n_bytes // size * block
    return float(8 * sum(own.values()) / numel)


@pytest.mark.parametrize("bits", [2.9, 3.5, 4.0, 4.5, 4.999, 5.0, 6.3, 7.9, 8.0, 8.5])
def test_bits_are_never_above_the_target_and_the_embedding_follows_them(
    wide: Path, config_of: Callable[[Path], ConvertConfig], bits: float
) -> None:
    figures = chosen(config_of(wide), bits=bits)
    assert bits - 0.08 < figures["bpw"] <= bits
    assert figures["bpw"] == pytest.approx(bpw(figures), abs=1e-12)
    embedding = "Q4_K" if bits < 5 else "Q6_K" if bits < 8 else "Q8_0"
    assert ends(figures) == (embedding, "Q6_K")


@pytest.mark.parametrize("head_bits", HEADS)
def test_the_head_follows_its_own_bits(
    wide: Path, config_of: Callable[[Path], ConvertConfig], head_bits: int
) -> None:
    assert ends(chosen(config_of(wide), bits=4.5, head_bits=head_bits)) == ("Q4_K", HEADS[head_bits])


@pytest.mark.parametrize(("bits", "embedding"), [(3.0, "Q6_K"), (4.5, "Q6_K"), (7.0, "Q6_K"), (8.2, "Q8_0")])
def test_an_embedding_that_is_the_head_too_has_at_least_q6_k_and_no_second_tensor(
    tied: Path, config_of: Callable[[Path], ConvertConfig], bits: float, embedding: str
) -> None:
    figures = chosen(config_of(tied), bits=bits, head_bits=2)
    assert ends(figures) == (embedding, None)
    assert "output.weight" not in figures["tensor_bytes"]


@pytest.mark.parametrize(
    ("bits", "found"), [(4.75, ("Q5_0", "Q8_0")), (6.0, ("Q8_0", "Q8_0")), (8.0, ("Q8_0", "Q8_0"))]
)
def test_types_whose_blocks_do_not_divide_the_rows_give_way(
    llama: Path, config_of: Callable[[Path], ConvertConfig], bits: float, found: tuple[str, str]
) -> None:
    assert ends(chosen(config_of(llama), bits=bits)) == found


@pytest.mark.parametrize("target", [{"bits": 4.0}, {"bits": None, "file_size": 600_000}, {"bits": 5.5}])
def test_linears_of_one_tensor_share_its_type(
    phi3: Path, config_of: Callable[[Path], ConvertConfig], target: dict[str, Any]
) -> None:
    figures = chosen(config_of(phi3), **target)
    names = {name.split(".", 2)[2] for name in figures["types"] if name.startswith("blk.1.")}
    assert names == {
        "attn_norm.weight",
        "ffn_norm.weight",
        "attn_qkv.weight",
        "attn_output.weight",
        "ffn_up.weight",
        "ffn_down.weight",
    }
    (output,), _ = make_outputs(make_plan(replace(config_of(phi3), **target)))
    options = output.allocate(measured.given(make_plan(config_of(phi3)))).options
    for parts in (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("mlp.gate_proj", "mlp.up_proj"),
    ):
        for block in range(2):
            assert len({options[f"model.layers.{block}.{part}"].desc for part in parts}) == 1


SIZES = [440_000, 470_001, 512_000, 600_000, 777_777, 900_000]


@pytest.mark.parametrize("size", SIZES)
def test_a_files_size_is_never_above_what_was_asked_and_nearly_all_of_it(
    wide: Path, config_of: Callable[[Path], ConvertConfig], size: int
) -> None:
    figures = chosen(config_of(wide), bits=None, file_size=size)
    assert 0.99 * size <= figures["file_bytes"] <= size


def test_embedding_and_head_are_choices_of_the_size_too(
    wide: Path, config_of: Callable[[Path], ConvertConfig]
) -> None:
    found = {ends(chosen(config_of(wide), bits=None, file_size=size)) for size in SIZES}
    assert len(found) > 2
    assert len({end for pair in found for end in pair}) > 2


@pytest.mark.parametrize("split", [None, 100_000])
def test_the_smallest_size_there_is_is_named_and_reached(
    wide: Path,
    config_of: Callable[[Path], ConvertConfig],
    monkeypatch: pytest.MonkeyPatch,
    split: int | None,
) -> None:
    monkeypatch.setattr(Model, "block", block_is_read)
    config = replace(config_of(wide), bits=None, file_size=1000, split_bytes=split)
    with pytest.raises(TargetError, match="the smallest file of this model has") as caught:
        make_outputs(make_plan(replace(config, measurement=None)))
    smallest = int(str(caught.value).split("has ")[1].split(";")[0])
    figures = chosen(config, file_size=smallest)
    assert figures["file_bytes"] == smallest
    kinds = {kind for name, kind in figures["types"].items() if "norm" not in name}
    assert kinds == {"Q2_K", "IQ4_NL"}
    with pytest.raises(TargetError):
        chosen(config, file_size=smallest - 1)


def test_a_size_beyond_all_types_gives_the_largest_of_each(
    wide: Path, config_of: Callable[[Path], ConvertConfig]
) -> None:
    figures = chosen(config_of(wide), bits=None, file_size=10**9)
    assert {kind for name, kind in figures["types"].items() if "norm" not in name} == {"Q8_0"}


@pytest.mark.parametrize(("size", "split"), [(600_000, None), (560_000, 200_000)])
def test_what_was_written_has_the_size_that_was_reckoned(
    wide: Path,
    config_of: Callable[[Path], ConvertConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    size: int,
    split: int | None,
) -> None:
    monkeypatch.setattr("exlq.pipeline.verify.ALLOWED_KL", 9.0)  # the losses are made up
    config = replace(config_of(wide), out_dir=tmp_path / "out", bits=None, file_size=size, split_bytes=split)
    made = convert(config)["outputs"]["gguf"]
    place = tmp_path / "out" / "gguf"
    assert 0.99 * size <= file_bytes(place) == made["file_bytes"] == made["bytes"] <= size
    shards = sorted(place.glob("*.gguf"))
    stem = f"Wide-1.0M-{size / (1 << 20):.2f}MiB"
    names = [f"{stem}-0000{i}-of-00004.gguf" for i in range(1, 5)] if split else [f"{stem}.gguf"]
    assert [path.name for path in shards] == names
    assert Stored.read(place).types == made["types"] == chosen(config)["types"]
    for path in shards if split else []:
        assert sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors) <= 200_000
    ((output, *_), _) = make_outputs(make_plan(config))
    assert output.opened(place).linear_weight("lm_head").shape == (272, 256)


PINS: dict[str, Any] = {
    "tensor_types": ("attn_v=Q8_0", "blk.1.ffn_(up|gate)=Q5_1"),
    "output_tensor_type": "Q5_K",
    "token_embedding_type": "F16",
}
TARGETS: list[dict[str, Any]] = [{"bits": 5.0}, {"file_size": 700_000}, {"gguf_type": "Q3_K_M"}]


@pytest.mark.parametrize(("target", "given"), [*((target, True) for target in TARGETS), (TARGETS[-1], False)])
def test_types_given_by_hand_hold_under_every_target(
    wide: Path, config_of: Callable[[Path], ConvertConfig], target: dict[str, Any], given: bool
) -> None:
    config = config_of(wide) if given else replace(config_of(wide), measurement=None)
    figures = chosen(config, **{"bits": None, **target, **PINS})
    types = figures["types"]
    assert ends(figures) == ("F16", "Q5_K")
    for block in (0, 1):
        assert types[f"blk.{block}.attn_v.weight"] == "Q8_0"
    for name in ("up", "gate"):
        assert types[f"blk.1.ffn_{name}.weight"] == "Q5_1"
    if "bits" in target:
        assert 4.9 < figures["bpw"] <= 5.0
        assert figures["bpw"] == pytest.approx(bpw(figures))
    if "file_size" in target:
        assert 690_000 < figures["file_bytes"] <= 700_000


def test_bits_that_types_given_by_hand_leave_out_of_reach_are_refused(
    wide: Path, config_of: Callable[[Path], ConvertConfig]
) -> None:
    with pytest.raises(TargetError, match=r"-b 3\.0: as GGUF this model reaches [4-9]"):
        chosen(config_of(wide), bits=3.0, tensor_types=("ffn=Q8_0",))


def test_weights_too_small_for_a_types_steps_get_a_wider_one_and_a_line_says_so(
    wide: Path, ids_file: Path, tmp_path: Path
) -> None:
    small, key = copied(wide, tmp_path / "small"), "model.layers.1.mlp.down_proj.weight"
    weight = load_file(small / "model.safetensors")[key] * 3e-6
    edit_tensors(small / "model.safetensors", **{key.replace(".", "__"): weight})
    target: dict[str, Any] = {"bits": None, "gguf_type": "Q4_K_M", "formats": ("gguf",)}
    made = convert(settings(small, tmp_path / "out", ids_file, **target))["outputs"]["gguf"]
    stored = Stored.read(tmp_path / "out" / "gguf")
    assert stored.types == made["types"]
    usual = chosen(settings(wide, tmp_path / "out", ids_file, **target))["types"]
    assert {name for name in usual if usual[name] != made["types"][name]} == {"blk.1.ffn_down.weight"}
    kept = made["types"]["blk.1.ffn_down.weight"]
    said = f"blk.1.ffn_down.weight is {kept}: its weights are too small for the steps of Q6_K"
    assert said in made["notes"]
    assert (stored.values("blk.1.ffn_down.weight") - weight).norm() < 0.1 * weight.norm()


def test_the_type_file_of_one_target_is_a_choice_by_hand_for_another(
    wide: Path, config_of: Callable[[Path], ConvertConfig]
) -> None:
    types = chosen(config_of(wide), bits=4.5)["types"]
    items = tuple(type_file(types).split())
    targets: list[dict[str, Any]] = [{"file_size": 700_000}, {"gguf_type": "Q3_K_M"}]
    for target in targets:
        assert chosen(config_of(wide), **{"bits": None, **target, "tensor_types": items})["types"] == types


def test_a_measurement_of_exl2_alone_is_refused_for_gguf_by_what_it_lacks(
    wide: Path, ids_file: Path, tmp_path: Path
) -> None:
    config = settings(wide, tmp_path / "out", ids_file, bits=4.5)
    record = made_up(config, tmp_path / "m.json")
    config = replace(config, measurement=record)
    assert job.rehearse(config)[0].keys() == {"exl2"}
    with pytest.raises(
        MeasurementError, match=r"no gguf options of model\.layers\.0\.mlp\.down_proj.*--measure"
    ):
        job.rehearse(replace(config, formats=("gguf",)))


@pytest.mark.parametrize(("family", "is_tied"), [("gemma3", True), ("qwen3", False)])
def test_every_matrix_has_a_type_and_every_vector_is_float32(
    tiny: TinyMaker, config_of: Callable[[Path], ConvertConfig], family: str, is_tied: bool
) -> None:
    figures = chosen(config_of(tiny(family, is_tied)), bits=5.0)
    assert all((kind == "F32") == ("norm" in name) for name, kind in figures["types"].items())
