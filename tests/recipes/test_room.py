"""What pins, types and rules leave to the solver."""

from __future__ import annotations

import pytest

from exlq.errors import ConfigError, MeasurementError
from exlq.formats.exl2_options import HEAD_OPTIONS
from exlq.formats.gguf_codec import HEAD_TYPES as CODEC_HEAD_TYPES
from exlq.recipes.ends import HEAD_TYPES, gguf_ends
from exlq.recipes.room import Room, Wishes, formats_of, parse_pins, parse_types, room_of
from exlq.recipes.sheet import sheet_of
from tests.recipes.helpers import record

HEAD, EMBEDDING = "lm_head", "model.embed_tokens"


def room(
    format: str, *pins: str, types: str | None = None, bits: float | None = None, tied: bool = False
) -> Room:
    made = record(tied=tied, ties=("self_attn.q_proj", "self_attn.v_proj"))
    return room_of(sheet_of(made, format), Wishes(parse_types(types, made), parse_pins(pins, made)), bits)


def descs(of: Room) -> dict[str, str]:
    return {key: option.desc for key, option in of.fixed.items()}


def test_the_first_pin_that_is_found_counts() -> None:
    pinned = descs(room("gguf", r"layers\.0\.mlp=q6_k", "mlp=Q2_K", "mlp=4"))
    assert pinned == {"model.layers.0.mlp.down_proj": "Q6_K", "model.layers.1.mlp.down_proj": "Q2_K"}


def test_a_pin_of_one_tied_linear_holds_for_its_tensor() -> None:
    keys = {f"model.layers.1.self_attn.{part}_proj" for part in "qv"}
    assert descs(room("gguf", r"1\.self_attn\.q=Q8_0")) == dict.fromkeys(keys, "Q8_0")


def test_bits_are_the_plain_option_of_exl2_and_of_the_head_what_hb_gives() -> None:
    pinned = descs(room("exl2", "q_proj=4", "v_proj=1:4b 64g s4", "lm_head=8", "down_proj=Q4_K"))
    assert pinned["model.layers.0.self_attn.q_proj"] == "1:4b 32g s4"
    assert pinned["model.layers.0.self_attn.v_proj"] == "1:4b 64g s4"
    assert pinned[HEAD] == HEAD_OPTIONS[8].desc
    assert not any(key.endswith("down_proj") for key in pinned)


def test_types_hold_for_the_decoder_of_the_formats_they_name() -> None:
    of = room("gguf", types="q4_k,Q6_K,3")
    assert {o.desc for linear in of.sheet.decoder for o in linear.options} == {"Q4_K", "Q6_K"}
    assert len(of.sheet.by_key[HEAD].options) == 4
    widths = {str(o.qparams["bits"]) for linear in room("exl2", types="3").free for o in linear.options}
    assert widths == {"[3]"}
    assert len(room("exl2", types="Q4_K").free[0].options) == 3


def test_a_pin_may_be_outside_the_types() -> None:
    assert descs(room("gguf", "v_proj=Q2_K", types="Q4_K"))["model.layers.0.self_attn.v_proj"] == "Q2_K"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("bits", "embedding"), [(4.0, "Q4_K"), (5.0, "Q6_K"), (8.0, "Q8_0")])
def test_ends_follow_the_bits(bits: float, embedding: str, tied: bool) -> None:
    ends = descs(room("gguf", bits=bits, tied=tied))
    if tied:
        assert ends == {EMBEDDING: "Q8_0" if bits >= 8 else "Q6_K"}
    else:
        assert ends == {EMBEDDING: embedding, HEAD: "Q6_K"}
    assert descs(room("gguf", tied=tied)) == {}
    assert descs(room("exl2", bits=bits, tied=tied)) == {HEAD: HEAD_OPTIONS[6].desc}


def test_the_head_types_are_those_of_the_codec() -> None:
    assert HEAD_TYPES == CODEC_HEAD_TYPES
    assert gguf_ends(4.0, 3, tied=False)[HEAD] == "Q3_K"


@pytest.mark.parametrize(
    ("pin", "words"),
    [
        ("v_proj", "is not REGEX=OPTION"),
        ("=Q4_K", "is not REGEX=OPTION"),
        ("v_proj=", "is not REGEX=OPTION"),
        ("(=Q4_K", "is no regular expression"),
        ("v_proj=Q5_K", "'Q5_K' was not measured"),
        ("w_proj=Q4_K", "finds no gguf matrix; they are named as model.layers.0.self_attn.q_proj"),
        ("w_proj=4", "finds no exl2 matrix"),
        ("v_proj=7", "has no option '7 bits' in exl2; it has 1:3b 32g s4, "),
        ("lm_head=1:3b 32g s4", "lm_head has no option '1:3b 32g s4' in exl2"),
    ],
)
def test_a_pin_that_cannot_be_is_refused(pin: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        [room(format, pin) for format in ("exl2", "gguf")]
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("types", "words"),
    [("Q5_K", "--types: Q5_K is not among"), (",", "lists nothing"), ("7", "--types: 7 is not among")],
)
def test_types_that_were_not_measured_are_refused(types: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        room("gguf", types=types)


def test_types_that_leave_a_matrix_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"--types 8 leaves model\.layers\.0.* nothing; it can be 3, 4"):
        room("exl2", types="8")


def test_formats_and_heads_that_are_not_there_are_refused() -> None:
    made = record()
    with pytest.raises(ConfigError, match="--format awq: the measurement has exl2, gguf"):
        formats_of(made, ["awq"])
    with pytest.raises(ConfigError, match="-hb 7"):
        Wishes(head_bits=7)
    with pytest.raises(MeasurementError, match="lm_head has no option 'Q3_K' in gguf"):
        room_of(sheet_of(made, "gguf"), Wishes(head_bits=3), 4.0)


def test_a_record_of_one_format_has_no_sheet_of_the_other() -> None:
    made = record().only(lambda linear: True, lambda option: option.format == "gguf")
    assert formats_of(made, None) == ("gguf",)
    with pytest.raises(MeasurementError, match="no exl2 options of anything"):
        sheet_of(made, "exl2")
