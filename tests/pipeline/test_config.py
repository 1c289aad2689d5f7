"""Settings that cannot work are refused when they are made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from exlq.errors import ConfigError
from exlq.names import HEAD_BITS
from exlq.pipeline.config import ConvertConfig, Methods
from exlq.sizing.effort import EFFORTS


def made(**changes: Any) -> ConvertConfig:
    return ConvertConfig(**{"in_dir": Path("in"), "out_dir": Path("out"), "bits": 5.0, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": None}, "no target: give -b BITS, --file-size SIZE or --gguf-type NAME, or -om FILE"),
        ({"bits": 0.0}, "-b 0.0"),
        ({"bits": -3.0}, "-b -3.0"),
        ({"bits": 16.1}, "at most 16"),
        ({"bits": float("nan")}, "-b nan"),
        ({"bits": float("inf")}, "-b inf"),
        ({"output_measurement": Path("m"), "compile_full": Path("f")}, "-om .* -cf"),
        ({"output_measurement": Path("m"), "measurement": Path("f")}, "-om .* -m"),
        ({"bits": 5.0, "file_size": 9}, "^-b and --file-size exclude one another: give one target"),
        ({"file_size": 9, "gguf_type": "F16", "bits": None}, "^--file-size and --gguf-type exclude"),
        ({"weighted": False, "gptq": False}, "--unweighted measures nothing: .* --no-gptq and --gguf-type"),
        ({"weighted": False, "bits": None, "gguf_type": "Q4_0"}, "--unweighted measures nothing"),
        ({"split_bytes": 0}, "--split-size 0: a size of at least one byte"),
        ({"measure": ("gguf9",)}, "--measure gguf9: known formats are exl2, gguf"),
        ({"formats": ()}, "known formats are exl2, gguf"),
        ({"formats": ("exl2", "gguf9")}, "exl2,gguf9: known formats are exl2"),
        ({"row_mode": "last"}, "--rows last: choose spread or first"),
        ({"states": "fp16"}, "--states fp16: choose float32 or bf16"),
        ({"shard_mib": -1}, "-ss -1"),
        *(
            ({name: least - 1}, f"{name} is {least - 1}; at least {least} is wanted")
            for name, least in (
                ("rows", 2),
                ("length", 3),
                ("measurement_rows", 2),
                ("measurement_length", 2),
                ("threads", 1),
            )
        ),
        *(({"head_bits": bits}, f"-hb {bits}: the head takes 2, 3, 4, 5, 6, 8") for bits in (0, 1, 7, 9, 16)),
    ],
)
def test_it_is_refused_with_what_would_do(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        made(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bits", HEAD_BITS)
def test_every_width_the_head_has_is_taken(bits: int) -> None:
    assert made(head_bits=bits).head_bits == bits


@pytest.mark.parametrize(
    ("changes", "rounding"),
    [
        ({}, "gptq"),
        ({"gptq": False}, "weighted"),
        ({"bits": None, "gguf_type": "Q4_0", "gptq": False, "weighted": False}, "unweighted"),
    ],
)
def test_the_way_of_rounding_has_a_name(changes: dict[str, Any], rounding: str) -> None:
    assert made(**changes).rounding == rounding


def test_a_recipe_alone_is_a_target_that_measures_nothing() -> None:
    assert made(bits=None, file_size=9).measures
    assert not made(bits=None, gguf_type="Q4_0").measures


def test_all_formats_are_measured_whatever_is_written_unless_said_otherwise() -> None:
    assert made(formats=("exl2",)).measured_formats == ("exl2", "gguf")
    assert made(measure=("gguf",)).measured_formats == ("gguf",)


def test_a_measurement_alone_needs_no_target() -> None:
    assert made(bits=None, output_measurement=Path("m.json")).bits is None


def test_its_json_holds_every_setting_and_paths_as_text() -> None:
    stored = made(calibration=Path("a") / "b.parquet", seed=4).as_json()
    assert json.loads(json.dumps(made(formats=("exl2",)).as_json()))["formats"] == ["exl2"]
    assert stored["formats"] is None
    assert stored["calibration"] == str(Path("a") / "b.parquet")
    assert stored.keys() == set(ConvertConfig.__dataclass_fields__)


def test_a_quick_conversion_leaves_the_descent_out() -> None:
    found = {name: ConvertConfig(Path("in"), Path("out"), bits=4.0, effort=name).descends for name in EFFORTS}
    assert found == {"quick": False, "normal": True, "best": True}
    assert not ConvertConfig(Path("in"), Path("out"), bits=4.0, methods=Methods(descent=False)).descends
