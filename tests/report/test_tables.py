"""Every figure a person is to see is in the table, as the summary has it."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from exlq.evaluate.divergence import Divergence
from exlq.pipeline.estimate import Estimate
from exlq.pipeline.plan import make_plan
from exlq.report.tables import evaluation_table, plan_table, protocol, summary_table
from tests.helpers import make_model
from tests.pipeline.helpers import settings, write_ids

FIGURES = Divergence(
    n_tokens=12800,
    n_chunks=50,
    context=512,
    perplexity_base=11.25,
    perplexity=11.5,
    kl_mean=0.0123,
    kl_se=0.0007,
    kl_median=0.0061,
    kl_p99=0.0911,
    top1_agreement=0.9433,
    noise_floor=3e-10,
)


def lines(table: Table) -> dict[str, str]:
    """The second column by the first, as it is shown."""
    text = io.StringIO()
    Console(file=text, width=400).print(table)
    rows = [line.split("│")[1:3] for line in text.getvalue().splitlines() if "│" in line]
    return {name.strip(): value.strip() for name, value in rows}


def summary(**result: Any) -> dict[str, Any]:
    return {
        "target": {"bits": 4.0, "head_bits": 6},
        "result": {
            "bpw": 3.99951,
            "optimality_gap": 0.00012,
            "predicted_kl": 0.0131,
            "evaluation": vars(FIGURES),
            "evaluated_on": "rows held out of both passes",
            **result,
        },
        "output": {
            "bytes": 3 << 20,
            "base_bytes": 5 << 30,
            "directory": "out/exl2",
            "measurement": "out/measurement.json",
        },
        "calibration": {"file": "valid.parquet"},
        "seconds": {"measuring": 119.4, "quantizing": 121.0, "verifying": 7300.0},
        "peak_anonymous_bytes": 700 << 20,
    }


def test_the_summary_shows_what_was_asked_got_and_lost() -> None:
    shown = lines(summary_table(summary()))
    assert shown["bits per weight"] == "3.9995 (asked 4)"
    assert shown["optimality gap"] == "0.0120 %"
    assert shown["size"] == "3.00 MiB (base 5.00 GiB)"
    assert shown["perplexity"] == "11.5000 (base 11.2500)"
    assert shown["KL divergence"] == "0.01230 ± 0.00070 nats per token (base 0)"
    assert shown["predicted"] == "0.01310"
    assert shown["same best token"] == "94.33 %"
    assert shown["compared on"] == "12,800 tokens of valid.parquet, rows held out of both passes"
    assert (shown["model"], shown["measurement"]) == ("out/exl2", "out/measurement.json")
    assert "measuring 119 s, quantizing 2 min, verifying 2.0 h" in shown["time"]


def test_the_evaluation_shows_every_figure() -> None:
    shown = lines(evaluation_table("out/exl2", FIGURES, Path("data") / "test.parquet"))
    assert shown["perplexity"] == "11.5000"
    assert shown["perplexity of the base"] == "11.2500"
    assert shown["KL divergence, mean"] == "0.012300 ± 0.000700"
    assert shown["KL divergence, median"] == "0.006100"
    assert shown["KL divergence, 99 %"] == "0.091100"
    assert shown["same best token"] == "94.330 %"
    assert shown["noise floor of the KL"] == "3.0e-10"
    assert shown["protocol"] == protocol(FIGURES)


def test_the_protocol_says_how_the_text_was_cut_and_scored() -> None:
    said = protocol(replace(FIGURES, n_chunks=7, context=256))
    for part in ("7 chunks of 256 tokens", "BOS", "second half scored", "12,800 tokens", "float32"):
        assert part in said


@pytest.mark.parametrize("bits", [None, 4.5])
def test_the_plan_shows_rows_target_and_what_it_takes(tmp_path: Path, bits: float | None) -> None:
    model = make_model("phi3", tmp_path / "model", tied=False)
    text = write_ids(tmp_path / "ids.parquet")
    wanted: dict[str, Any] = {"bits": bits, "output_measurement": None if bits else tmp_path / "m.json"}
    plan = make_plan(settings(model, tmp_path / "out", text, rows=300, **wanted))
    work = Estimate(80e9, 60.0, 200.0, 3 << 30, 5 << 20, 900 << 10)
    shown = lines(plan_table(plan, work))
    assert shown["model"] == f"{model} (Phi3ForCausalLM, 2 blocks)"
    asked = "4.5 bits per weight" if bits else "measurement only"
    assert shown["target"].startswith(f"{asked}, head 6 bits; reachable 2.")
    assert shown["measured on"] == "24 rows of 64 tokens, 3 of them held out"
    assert shown["quantized on"] == "256 rows of 64 tokens, 32 of them held out"
    assert shown["arithmetic"] == "80 GFLOP/s in matrix products on cpu"
    assert shown["time, about"] == "4 min (60 s measuring)"
    assert shown["memory, about"] == "3.00 GiB"
    assert shown["disk, about"] == "5.00 MiB, of which the result 900.0 KiB"
    assert shown["note"] == "256 of 300 rows: the file holds 16384 tokens, 19200 wanted"
