from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from exlq import allocation
from exlq.errors import MeasurementError
from exlq.measurement import (
    LinearRecord,
    Measurement,
    OptionRecord,
    differences,
    dumps,
    load,
    save,
    to_items,
)

NUMEL = 1000


def option(desc: str, total_bits: int, loss: float, **qparams: Any) -> OptionRecord:
    return OptionRecord(
        desc,
        total_bits / NUMEL,
        total_bits,
        loss / 3,
        qparams or {"bits": [4]},
        loss / 2.7,
        loss,
        err_se=1e-5,
    )


def linear(key: str, **fields: Any) -> LinearRecord:
    options = (
        option("2b", 2345, 0.1 + 0.2, group_size=32, bits=[2], bits_prop=[1.0], scale_bits=4),
        option("Q4_K", 4500, 5e-324, type="Q4_K"),
        option("6b", 6100, 0.0, bits=[6]),
    )
    return LinearRecord(key, NUMEL, options, **fields)


def record() -> Measurement:
    linears = (
        linear("a.q_proj", sensitivity=1 / 3, tie="qk", sampled_rows=1024),
        linear("a.k_proj", tie="qk"),
        linear("lm_head"),
    )
    return Measurement(
        {"config_sha256": "ab" * 32},
        {"sha256": "cd" * 32, "rows": 100},
        {"length": 2048, "options": [2, 3.5]},
        linears,
        extra={"evaluation": {"kl": 0.012, "name": "é"}},
    )


def test_a_record_comes_back_from_its_file_unchanged_and_to_the_same_bytes(tmp_path: Path) -> None:
    path = tmp_path / "measurement.json"
    save(record(), path)
    assert load(path) == record()
    assert dumps(load(path)) == path.read_text(encoding="utf-8")


def test_each_option_stands_on_a_line_of_its_own_and_the_file_is_as_documented() -> None:
    text = dumps(record())
    tree = json.loads(text)
    assert list(tree) == [
        "format",
        "version",
        "model",
        "calibration",
        "settings",
        "measurement",
        "evaluation",
    ]
    assert (tree["format"], tree["version"]) == ("exlq-measurement", 1)
    assert text.endswith("}\n")
    lines = [line.strip().rstrip(",") for line in text.splitlines()]
    for entry in tree["measurement"]:
        for value in entry["options"]:
            assert value in [
                json.loads(line) for line in lines if line.startswith('{"desc"') and line[-1] == "}"
            ]
    first = tree["measurement"][0]["options"][0]
    assert list(first)[:5] == ["desc", "bpw", "total_bits", "err", "qparams"]
    assert '"total_bits": 2345.0' in text
    assert "tie" not in tree["measurement"][2]


def test_a_record_grows_linear_by_linear() -> None:
    whole = record()
    grown = replace(whole, linears=())
    for entry in whole.linears:
        grown = grown.with_linear(entry)
    assert grown == whole
    with pytest.raises(MeasurementError, match=r"a\.q_proj.*twice"):
        grown.with_linear(whole.linears[0])


def test_what_the_solver_is_given_are_the_recorded_bits_losses_and_ties() -> None:
    items = to_items(record())
    assert [(item.key, item.tie) for item in items] == [
        ("a.q_proj", "qk"),
        ("a.k_proj", "qk"),
        ("lm_head", None),
    ]
    assert items[0].choices == ((2345, 0.1 + 0.2), (4500, 5e-324), (6100, 0.0))
    assert allocation.solve(items, 3 * 2345 + 3000).choice == {"a.q_proj": 0, "a.k_proj": 0, "lm_head": 1}


def test_only_the_wanted_linears_and_options_are_kept() -> None:
    kept = record().only(lambda entry: entry.key != "lm_head", lambda choice: choice.format == "exl2")
    assert [entry.key for entry in kept.linears] == ["a.q_proj", "a.k_proj"]
    assert [choice.desc for choice in kept.linears[1].options] == ["2b", "6b"]
    with pytest.raises(MeasurementError, match=r"a\.q_proj has none of the options wanted"):
        record().only(lambda entry: True, lambda choice: choice.desc == "3b")


def test_differences_name_the_entry_and_both_values() -> None:
    now = {
        "model": {"config_sha256": "ab" * 32},
        "calibration": {"sha256": "ef" * 32, "rows": 100, "seed": 7},
        "settings": {"length": 512, "options": (2, 3.5)},
    }
    lines = differences(record().origin, now)
    assert len(lines) == 3
    assert lines[0].startswith("calibration sha256: measured cdcdcd")
    assert ", now efefef" in lines[0]
    assert lines[1:] == [
        "settings length: measured 2048, now 512",
        "calibration seed: measured nothing, now 7",
    ]
    assert differences(now, now) == []


Edit = Callable[[Any], object]


def first_option(tree: Any) -> Any:
    return tree["measurement"][0]["options"][0]


EDITS: list[tuple[Edit, str]] = [
    (lambda t: t.update(format="exl2"), "format is 'exl2'"),
    (lambda t: t.pop("format"), "format is None"),
    (lambda t: t.update(version=2), "version is 2, not 1"),
    (lambda t: t.update(version=True), "version is True"),
    (lambda t: t.pop("calibration"), "calibration is None, not a JSON object"),
    (lambda t: t.update(measurement={}), "measurement is {}, not a JSON list"),
    (lambda t: t.update(measurement=[3]), "linear 0 is 3, not a JSON object"),
    (lambda t: t["measurement"][0].pop("key"), "linear 0 lacks key"),
    (lambda t: t["measurement"][0].update(key="a\nb"), "key is 'a\\\\nb', not printable text"),
    (lambda t: t["measurement"][0].update(numel=-4), r"a\.q_proj: numel is -4"),
    (lambda t: t["measurement"][0].update(numel=10.5), r"a\.q_proj: numel is 10\.5"),
    (lambda t: t["measurement"][0].update(numel=10**39), r"a\.q_proj: numel is 1000"),
    (lambda t: t["measurement"][0].update(numel=999), r"a\.q_proj, option '2b': bpw is 2\.345"),
    (lambda t: t["measurement"][0].update(options=[]), r"a\.q_proj has no options"),
    (lambda t: t["measurement"][0].pop("options"), r"a\.q_proj: options is None, not a JSON list"),
    (lambda t: t["measurement"][0].update(sensitivity="high"), r"a\.q_proj: sensitivity is 'high'"),
    (lambda t: t["measurement"][0].update(tie=3), r"a\.q_proj: tie is 3"),
    (lambda t: t["measurement"][0].update(sampled_rows=0), r"a\.q_proj: sampled_rows is 0"),
    (lambda t: t["measurement"][0].update(colour="red"), r"a\.q_proj has the unknown 'colour'"),
    (lambda t: t["measurement"][1].update(key="a.q_proj"), r"linear 'a\.q_proj' is recorded twice"),
    (lambda t: t["measurement"][1]["options"].pop(), r"a\.q_proj and a\.k_proj are tied"),
    (lambda t: t["measurement"][0]["options"].insert(0, "2b"), r"a\.q_proj, option 0 is '2b'"),
    (lambda t: first_option(t).pop("loss"), r"a\.q_proj, option 0 lacks loss"),
    (lambda t: first_option(t).update(desc="6b"), r"a\.q_proj: option '6b' is recorded twice"),
    (lambda t: first_option(t).update(total_bits=-8), r"a\.q_proj, option '2b': total_bits is -8"),
    (lambda t: first_option(t).update(total_bits=0.5), r"a\.q_proj, option '2b': total_bits is 0\.5"),
    (lambda t: first_option(t).update(total_bits=1e300), r"option '2b': total_bits is 1000"),
    (lambda t: first_option(t).update(err=-1e-9), r"a\.q_proj, option '2b': err is -1e-09"),
    (lambda t: first_option(t).update(err=True), r"a\.q_proj, option '2b': err is True"),
    (lambda t: first_option(t).update(loss=None), r"a\.q_proj, option '2b': loss is None"),
    (lambda t: first_option(t)["qparams"].update(bits=4), r"a\.q_proj, option '2b': bits is 4, not a list"),
    (
        lambda t: first_option(t).update(qparams={"type": {"a": 1}}),
        r"option '2b': type is .*, not printable text",
    ),
    (lambda t: first_option(t).update(loss=10**400), r"a number has 401 digits, at most 40"),
    (lambda t: first_option(t).update(err_heldout=-1), r"option '2b': err_heldout is -1"),
    (lambda t: first_option(t).update(err_se=[]), r"option '2b': err_se is \[\]"),
    (lambda t: first_option(t).update(qparams={"group_size": 32}), "either bits or type"),
    (lambda t: first_option(t).update(qparams=[4]), r"option '2b': qparams is \[4\]"),
]


@pytest.mark.parametrize(("edit", "message"), EDITS)
def test_a_broken_record_is_refused_in_one_line_with_file_and_linear(
    tmp_path: Path, edit: Edit, message: str
) -> None:
    tree = json.loads(dumps(record()))
    edit(tree)
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(tree), encoding="utf-8")
    with pytest.raises(MeasurementError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 200


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{",
        b"null",
        b'{"format": NaN}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a": 1, "a": 1}',
        b"\x00" * 9,
    ],
)
def test_a_file_that_is_no_record_is_a_measurement_error(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "m.json").write_bytes(data)
    with pytest.raises(MeasurementError, match=r"m\.json"):
        load(tmp_path / "m.json")


def test_a_missing_file_is_a_measurement_error(tmp_path: Path) -> None:
    with pytest.raises(MeasurementError, match=r"absent\.json cannot be read"):
        load(tmp_path / "absent.json")


def test_values_json_does_not_have_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    for value in (float("nan"), {"at": tmp_path}, {1, 2}):
        with pytest.raises(MeasurementError, match="cannot be stored as JSON"):
            save(replace(record(), settings={"value": value}), path)
    assert not path.exists()
    save(replace(record(), settings=MappingProxyType({"value": 1})), path)
    assert load(path).settings == {"value": 1}


def test_extra_values_may_not_take_the_records_own_names() -> None:
    with pytest.raises(MeasurementError, match="'model'"):
        replace(record(), extra={"model": 1})
