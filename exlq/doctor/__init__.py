"""What a calibration text is made of, and what a conversion of a model would make of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from exlq.calibration import Source, load_tokenizer
from exlq.calibration.source import read_batches
from exlq.default_calibration import default_calibration
from exlq.doctor import duplicates, languages, oddities
from exlq.doctor.advice import advise
from exlq.doctor.record import Advice, Diagnosis, Duplicates, Lengths, Tokens
from exlq.doctor.sample import Sample, sampled, texts_of
from exlq.doctor.tokens import count_tokens
from exlq.errors import CalibrationError, ConfigError

__all__ = ["Advice", "Diagnosis", "Duplicates", "Lengths", "Tokens", "diagnose"]

WORD = re.compile(r"\w+")


def diagnose(
    path: Path | None = None,
    model: Path | None = None,
    *,
    rows: int | None = None,
    length: int | None = None,
    text_column: str | None = None,
    parse_special: bool = False,
    seed: int = 0,
) -> Diagnosis:
    """Looks at a parquet file, by default the bundled one, as a conversion of `model` would read it.

    Args:
        model: directory with config.json and tokenizer; without one, tokens are not counted.
        rows, length: as `-r` and `-l` of a conversion.
        seed: of the rows that are drawn from a large file.

    Raises:
        CalibrationError: if the file cannot be used.
        ModelError: if the model has no usable tokenizer or config.json.
        ConfigError: for rows or a length that is out of range, or without a model.
    """
    if model is None and (rows, length) != (None, None):
        raise ConfigError("rows (-r) and their length (-l) are counted in tokens; give --model as well")
    path = default_calibration() if path is None else path
    tokenizer = None if model is None else load_tokenizer(model)
    with sampled(path, text_column, seed) as sample:
        try:
            cells = texts_of(sample.source)
            _refuse_surrogates(sample.source, cells)
            tokens = None
            if model is not None and tokenizer is not None:
                tokens = count_tokens(sample, tokenizer, model, rows, length, parse_special)
            if sample.source.kind == "input_ids":
                cells = _decoded(sample.source, tokenizer)
        except CalibrationError as exc:  # what is drawn from a large file has another path
            raise CalibrationError(str(exc).replace(str(sample.source.path), str(path))) from exc
        special = oddities.special_tokens(tokenizer)
        found = _look(sample, cells, () if sample.source.kind == "input_ids" else special)
    reason = "the first there is of text, messages, input_ids" if text_column is None else "named"
    found = replace(found, reason=reason, seed=seed, parse_special=parse_special, tokens=tokens)
    return replace(found, advice=advise(found))


def _refuse_surrogates(source: Source, cells: Sequence[str | None]) -> None:
    """JSON can spell halves of UTF-16 pairs, and tokenizers fail on them."""
    for cell in cells:
        if cell is not None and oddities.SURROGATE.search(cell):
            raise CalibrationError(
                f"{source.path}: a row of {source.column} holds a lone surrogate (half of a UTF-16 pair), "
                f"which no tokenizer takes: {cell[:40]!a}; repair or drop it"
            )


def _look(sample: Sample, cells: Sequence[str | None], special: Sequence[str]) -> Diagnosis:
    """What the rows themselves tell."""
    texts = [cell for cell in cells if cell is not None and cell.strip()]
    found = languages.mix(texts)
    return Diagnosis(
        file=sample.source.path.name,
        columns=sample.columns,
        column=sample.source.column,
        kind=sample.source.kind,
        reason="",
        rows=sample.rows,
        sampled=sample.sampled,
        looked_at=sample.source.rows,
        seed=0,
        empty=sum(cell is not None and not cell.strip() for cell in cells),
        null=sum(cell is None for cell in cells),
        characters=sum(map(len, texts)),
        words=sum(len(WORD.findall(text)) for text in texts),
        lengths=_lengths(texts),
        duplicates=duplicates.find(texts),
        scripts=found.scripts,
        languages=found.languages,
        code=found.code,
        special=oddities.spelled_out(texts, special),
        parse_special=False,
        odd=oddities.odd(texts),
        tokens=None,
        advice=(),
    )


def _decoded(source: Source, tokenizer: PreTrainedTokenizerBase | None) -> list[str | None]:
    """The text of rows of ids; without a tokenizer only whether they hold something."""
    cells = [cell for batch in read_batches(source) for cell in batch.to_pylist()]
    if tokenizer is None:
        return [None if cell is None else "" for cell in cells if not cell]
    return [None if cell is None else str(tokenizer.decode(cell)) for cell in cells]


def _lengths(texts: list[str]) -> Lengths | None:
    sizes = sorted(map(len, texts))
    if not sizes:
        return None
    return Lengths(sizes[0], sizes[len(sizes) // 2], sizes[len(sizes) * 95 // 100], sizes[-1])
