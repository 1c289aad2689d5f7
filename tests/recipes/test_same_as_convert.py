"""A solved target has the options that a conversion to it has, and a conversion takes a recipe's."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from exlq import measurement
from exlq.errors import ConfigError, TargetError
from exlq.measurement import Measurement
from exlq.pipeline.config import ConvertConfig
from exlq.pipeline.outputs import OUTPUTS
from exlq.pipeline.overhead import overhead_bytes
from exlq.pipeline.plan import Plan, make_plan
from exlq.recipes import stored
from exlq.recipes.room import Wishes
from exlq.recipes.solve import Solved, Targets, solve
from tests.conftest import REPOSITORY
from tests.pipeline.helpers import write_ids

RECORD = REPOSITORY / "measurements" / "tiny-llama.json"
BITS = (2.7, 3.3, 4.2, 5.0, 6.1, 8.0)


@pytest.fixture(scope="module")
def plan(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    place = tmp_path_factory.mktemp("same")
    ids = write_ids(place / "ids.parquet")
    small = {"rows": 8, "length": 64, "measurement_rows": 8, "measurement_length": 64}
    return make_plan(ConvertConfig(tiny_llama, place / "out", calibration=ids, bits=4.0, **small))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def record(plan: Plan) -> Measurement:
    found = measurement.load(RECORD)
    return replace(found, extra={**found.extra, "overhead_bytes": overhead_bytes(plan)})


def asked(plan: Plan, **changes: object) -> Plan:
    """The plan with another target."""
    return replace(plan, config=replace(plan.config, **{"bits": None, **changes}))  # type: ignore[arg-type]


def only(solved: Solved, format: str) -> tuple[dict[str, str], float]:
    found = next(answer for answer in solved.answers if answer.sheet.format == format)
    return {key: option.desc for key, option in found.options.items()}, found.bpw


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("format", ["exl2", "gguf"])
@pytest.mark.parametrize("head_bits", [6, 4])
def test_bits_have_the_options_of_a_conversion(
    plan: Plan, record: Measurement, format: str, bits: float, head_bits: int
) -> None:
    begin = time.process_time()
    solved = solve(record, Targets(bits=(bits,)), [format], Wishes(head_bits=head_bits))
    assert time.process_time() - begin < 1
    output = OUTPUTS[format](asked(plan, bits=bits, head_bits=head_bits))
    choice = output.allocate(record)
    expected = {key: option.desc for key, option in choice.options.items()}
    assert only(solved, format) == (expected, choice.bpw)
    assert solved.answers[0].sheet.loss(solved.answers[0].options) == pytest.approx(choice.loss)


@pytest.mark.parametrize("size", [1_600_000, 2_000_000, 2_600_000, 3_141_593, 10_000_000])
def test_bytes_have_the_options_of_a_conversion(plan: Plan, record: Measurement, size: int) -> None:
    output = OUTPUTS["gguf"](asked(plan, file_size=size))
    solved = solve(record, Targets(file_sizes=(size,)), ["gguf"])
    choice = output.allocate(record)
    assert only(solved, "gguf") == ({key: o.desc for key, o in choice.options.items()}, choice.bpw)
    told = output.figures(choice)["file_bytes"]
    assert abs(told - solved.answers[0].n_bytes) <= 64  # what the text of the target takes


def test_a_conversion_takes_the_recipe(plan: Plan, record: Measurement, tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    solved = solve(record, Targets(bits=(3.7,)), None, Wishes(head_bits=4))
    stored.save(stored.recipe_of(solved.answers, record), path)
    here = asked(plan, recipe=path)
    assert here.config.targets == {"--recipe": "recipe.json"}
    assert not here.config.measures
    for format in ("exl2", "gguf"):
        output = OUTPUTS[format](here)
        unmeasured, measured = output.allocate(None), output.allocate(record)
        assert unmeasured.loss is None
        assert unmeasured.options == measured.options
        assert ({key: o.desc for key, o in measured.options.items()}, measured.bpw) == only(solved, format)
        answer = next(answer for answer in solved.answers if answer.sheet.format == format)
        assert measured.loss == pytest.approx(answer.sheet.loss(answer.options))
        if format == "exl2":
            assert output.figures(measured)["head_bits"] == 4
        else:
            assert abs(output.figures(measured)["file_bytes"] - answer.n_bytes) <= 64


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"options": {"lm_head": "Q6_K"}}, "recipe.json lacks model"),
        ({"more": {"model.layers.9.mlp.up_proj": "Q6_K"}}, "recipe.json has model.layers.9.mlp.up_proj"),
        ({"more": {"lm_head": "Q9_K"}}, "lm_head cannot be 'Q9_K' in gguf; it can be Q2_K, "),
    ],
)
def test_a_recipe_that_is_not_of_the_model_is_refused(
    plan: Plan, record: Measurement, tmp_path: Path, change: dict[str, dict[str, str]], words: str
) -> None:
    path = tmp_path / "recipe.json"
    stored.save(stored.recipe_of(solve(record, Targets(bits=(4.0,)), ["gguf"]).answers, record), path)
    tree = json.loads(path.read_text(encoding="utf-8"))
    output = tree["outputs"]["gguf"]
    output["fixed"] = []
    output["options"] = change.get("options", {**output["options"], **change.get("more", {})})
    path.write_text(json.dumps(tree), encoding="utf-8")
    with pytest.raises(TargetError) as caught:
        OUTPUTS["gguf"](asked(plan, recipe=path))
    assert words in str(caught.value)
    with pytest.raises(TargetError, match=r"recipe\.json has gguf alone; solve for exl2 too"):
        OUTPUTS["exl2"](asked(plan, recipe=path))


def test_a_recipe_is_a_target_of_its_own() -> None:
    place = Path("r.json")
    with pytest.raises(ConfigError, match="-b and --recipe exclude one another"):
        ConvertConfig(Path("m"), Path("o"), bits=4.0, recipe=place)
    with pytest.raises(ConfigError, match="-om measures and --recipe wants no measurement"):
        ConvertConfig(Path("m"), Path("o"), recipe=place, output_measurement=Path("m.json"))
