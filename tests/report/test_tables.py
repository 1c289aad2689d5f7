"""Every figure a person is to see is in the table, as the summary has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from exlq.pipeline.estimate import Estimate
from exlq.pipeline.outputs import make_outputs
from exlq.pipeline.plan import make_plan
from exlq.report.tables import plan_table, summary_table, types_table
from tests.helpers import make_model
from tests.pipeline.helpers import settings, write_ids
from tests.report.helpers import FIGURES, lines, shown


def made(**figures: Any) -> dict[str, Any]:
    """What became of one format."""
    return {
        "bpw": 3.99951,
        "optimality_gap": 0.00012,
        "predicted_kl": 0.0131,
        "predicted_se": 0.002,
        "evaluation": vars(FIGURES),
        "bytes": 3 << 20,
        "paths": ["out/exl2"],
        "notes": [],
        **figures,
    }


def summary(outputs: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "target": {"-b": 4.0},
        "outputs": outputs,
        "notes": [],
        "base_bytes": 5 << 30,
        "measurement": "out/measurement.json",
        "evaluated_on": "rows held out of both passes",
        "calibration": {"file": "valid.parquet"},
        "seconds": {"measuring": 119.4, "quantizing": 121.0, "verifying": 7300.0},
        "peak_anonymous_bytes": 700 << 20,
        **changes,
    }


def test_the_summary_shows_what_was_asked_got_and_lost() -> None:
    found = lines(summary_table(summary({"exl2": made()})))
    assert found["exl2: bits per weight"] == "3.9995 (asked 4)"
    assert found["optimality gap"] == "0.0120 %"
    assert found["size"] == "3.00 MiB"
    assert found["base"] == "5.00 GiB, perplexity 11.2500"
    assert found["perplexity"] == "11.5000"
    assert found["KL divergence"] == "0.01230 ± 0.00070 nats per token (base 0)"
    assert found["predicted"] == "0.01310 ± 0.00200"
    assert found["same best token"] == "94.33 %"
    assert found["compared on"] == "12,800 tokens of valid.parquet, rows held out of both passes"
    assert (found["file"], found["measurement"]) == ("out/exl2", "out/measurement.json")
    assert "measuring 119 s, quantizing 2 min, verifying 2.0 h" in found["time"]
    assert "note" not in found


def test_the_summary_of_two_formats_shows_both_and_the_whole_files_bits() -> None:
    gguf = made(bpw=3.875, bytes=4 << 20, file_bpw=4.0625, paths=["out/gguf/a.gguf", "out/gguf/a.types.txt"])
    text = shown(summary_table(summary({"exl2": made(), "gguf": gguf})))
    rows = [tuple(cell.strip() for cell in row.split("│")[1:3]) for row in text.splitlines() if "│" in row]
    assert rows.index(("exl2: bits per weight", "3.9995 (asked 4)")) < rows.index(
        ("gguf: bits per weight", "3.8750 (asked 4)")
    )
    assert ("size", "4.00 MiB, 4.062 bits per weight with embedding and head") in rows
    assert [value for name, value in rows if name == "file"] == ["out/exl2", *gguf["paths"]]


def test_a_file_that_was_not_measured_says_so_and_a_format_left_out_says_why() -> None:
    unmeasured = made(predicted_kl=None, optimality_gap=None, notes=["output.weight is F16"])
    changes: dict[str, Any] = {"target": {"--gguf-type": "Q4_K_M"}, "measurement": None}
    table = summary_table(summary({"gguf": unmeasured}, notes=["no exl2: why"], **changes))
    found = lines(table)
    assert found["gguf: bits per weight"] == "3.9995"
    assert found["predicted"] == "not measured"
    assert found["note"] == "no exl2: why"
    assert "output.weight is F16" in shown(table)
    assert not {"optimality gap", "measurement"} & found.keys()


def test_the_types_are_shown_one_by_one_with_the_bytes_of_the_file() -> None:
    table = types_table([("token_embd.weight", "Q6_K", 430080), ("output_norm.weight", "F32", 1024)], 500000)
    text = shown(table)
    for parts in (("token_embd.weight", "Q6_K", "430,080"), ("output_norm.weight", "F32", "1,024")):
        assert any(all(part in row for part in parts) for row in text.splitlines())
    assert "500,000" in next(row for row in text.splitlines() if "the file with its metadata" in row)


TARGETS: dict[str, dict[str, Any]] = {
    "4.5 bits per weight, head 6 bits": {"bits": 4.5},
    "measurement only": {"bits": None, "output_measurement": Path("m.json")},
    "at most 1.00 MiB": {"bits": None, "file_size": 1 << 20},
    "Q4_K_M": {"bits": None, "gguf_type": "Q4_K_M"},
}


@pytest.mark.parametrize("target", TARGETS)
def test_the_plan_shows_rows_target_and_what_it_takes(tmp_path: Path, target: str) -> None:
    model = make_model("phi3", tmp_path / "model", tied=False)
    text = write_ids(tmp_path / "ids.parquet")
    changes: dict[str, Any] = {"rows": 300, "formats": None, "measure": None, **TARGETS[target]}
    plan = make_plan(settings(model, tmp_path / "out", text, **changes))
    outputs, notes = ((), ()) if "m.json" in str(plan.config.output_measurement) else make_outputs(plan)
    work = Estimate(80e9, {"measuring": 60.0, "quantizing gguf": 200.0}, 3 << 30, 5 << 20, 900 << 10)
    found = lines(plan_table(plan, outputs, notes, work))
    assert found["model"] == f"{model} (Phi3ForCausalLM, 2 blocks)"
    assert found["target"] == target
    for output in outputs:
        assert found[output.name] == f"reachable {output.reach}"
    assert found["measured on"] == "24 rows of 64 tokens, 3 of them held out"
    assert found["quantized on"] == "256 rows of 64 tokens, 32 of them held out"
    assert found["arithmetic"] == "80 GFLOP/s in matrix products on cpu"
    assert found["time, about"] == "4 min (60 s measuring)"
    assert found["memory, about"] == "3.00 GiB"
    assert found["disk, about"] == "5.00 MiB, of which the result 900.00 KiB"
    said = shown(plan_table(plan, outputs, notes, work))
    assert "256 of 300 rows: the file holds 16384 tokens, 19200 wanted" in said
    assert all(note in said for note in notes)
