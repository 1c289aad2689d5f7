"""Answers, frontiers and reasons as JSON values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from exlq.recipes.explain import Change, Reason
from exlq.recipes.frontier import Point
from exlq.recipes.prediction import Prediction
from exlq.recipes.targets import Answer


def answer_json(answer: Answer) -> dict[str, Any]:
    """Target, figures, options and the division between GPU and CPU, if there is one."""
    return {
        "target": dict(answer.target),
        "format": answer.sheet.format,
        "bpw": answer.bpw,
        "bytes": answer.n_bytes,
        **_kl(answer.predicted),
        "split": None if answer.split is None else answer.split._asdict(),
        "fixed": list(answer.fixed),
        "options": {key: option.desc for key, option in answer.options.items()},
    }


def points_json(points: Sequence[Point]) -> list[dict[str, Any]]:
    return [{"bpw": p.bpw, "bytes": p.n_bytes, "loss": p.loss, **_kl(p.predicted)} for p in points]


def reasons_json(found: Sequence[Reason]) -> list[dict[str, Any]]:
    return [asdict(reason) for reason in found]


def changes_json(changes: Sequence[Change]) -> list[dict[str, Any]]:
    return [
        {
            "key": change.key,
            **{
                side: {"desc": option.desc, "bits": option.total_bits, "err": option.err, "loss": option.loss}
                for side, option in (("before", change.before), ("after", change.after))
            },
        }
        for change in changes
    ]


def _kl(predicted: Prediction | None) -> dict[str, float | None]:
    kl, se = (None, None) if predicted is None else (predicted.kl, predicted.se)
    return {"predicted_kl": kl, "predicted_se": se}
