"""Tables of one model and of several, and what they say of how they were made."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from exlq.evaluation.run import Evaluation, Settings
from exlq.names import LLAMA_CPP
from exlq.report.evaluation import comparison_table, evaluation_table, protocol
from tests.report.helpers import FIGURES, lines, shown

TEXT = Path("data") / "test.parquet"
IN_TORCH, IN_LLAMA_CPP = Settings(), Settings(runtime=LLAMA_CPP)


def evaluation(name: str, n_bytes: int, kl: float = FIGURES.kl_mean) -> Evaluation:
    return Evaluation(Path(name), n_bytes, replace(FIGURES, kl_mean=kl))


def test_the_table_of_one_model_shows_every_figure() -> None:
    found = lines(evaluation_table(evaluation("out/exl2", 12345678), TEXT, IN_TORCH))
    assert found["bytes"] == "12,345,678"
    assert found["perplexity"] == "11.5000"
    assert found["perplexity of the base"] == "11.2500"
    assert found["KL divergence, mean"] == "0.012300 ± 0.000700"
    assert found["KL divergence, median"] == "0.006100"
    assert found["KL divergence, 99 %"] == "0.091100"
    assert found["same best token"] == "94.330 %"
    assert found["noise floor of the KL"] == "3.0e-10"
    assert found["protocol"] == protocol(FIGURES, IN_TORCH)


def test_models_of_equal_bytes_carry_the_same_letter_and_no_others_do() -> None:
    models = [("a", 100), ("b", 200), ("c", 100), ("d", 300), ("e", 200), ("f", 400)]
    table = comparison_table([evaluation(*model) for model in models], TEXT, IN_LLAMA_CPP)
    rows = [
        [cell.strip() for cell in row.split("│")[1:-1]] for row in shown(table).splitlines() if "│" in row
    ]
    assert {row[0]: row[2] for row in rows} == {"a": "a", "b": "b", "c": "a", "d": "", "e": "b", "f": ""}
    assert "same letter under = have equal bytes" in " ".join(shown(table).split())


def test_without_equal_bytes_the_caption_explains_no_letter() -> None:
    table = comparison_table([evaluation("a", 1), evaluation("b", 2)], TEXT, IN_TORCH)
    assert "same letter" not in shown(table)


def test_a_row_of_several_models_shows_what_the_table_of_one_does() -> None:
    table = comparison_table([evaluation("x", 1 << 20, 0.5), evaluation("y", 7)], TEXT, IN_LLAMA_CPP)
    row = next(line for line in shown(table).splitlines() if "1,048,576" in line)
    for part in ("11.5000", "0.500000 ± 0.000700", "0.006100", "0.091100", "94.330 %"):
        assert part in row
    said = " ".join(shown(table).split())
    for part in ("on test.parquet", "perplexity of the base 11.2500", "3.0e-10", "50 chunks of 512"):
        assert part in said


def test_the_protocol_says_how_the_text_was_cut_and_scored() -> None:
    said = protocol(replace(FIGURES, n_chunks=7, context=256), IN_TORCH)
    for part in ("7 chunks of 256 tokens", "BOS", "second half scored", "12,800 tokens", "float32"):
        assert part in said


def test_the_protocol_says_what_ran_the_files() -> None:
    assert "torch" in protocol(FIGURES, IN_TORCH)
    assert "round activations too" in protocol(FIGURES, IN_LLAMA_CPP)
    said = protocol(FIGURES, Settings(runtime=LLAMA_CPP, weights_only=True))
    assert "dequantized to float32 and run by llama.cpp" in said
