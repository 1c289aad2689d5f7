"""What KL divergence an allocation lets expect, and how far that can be trusted."""

from __future__ import annotations

import math
from dataclasses import dataclass

# Of the sum of losses, what is measured where nothing is made up for, and where later linears make up for
# what earlier ones have changed: the first at vanishing errors, the second per root of the sum, for errors
# inside a block add to one another. From conversions of two models on two texts: docs/fidelity.md.
UNCORRECTED = (1.0, 1.2)
CORRECTED = (0.75, 1.0)
MODEL_ERROR = 0.3  # relative, of that rule from model to model and text to text
ROW_ERROR = 0.076  # relative, of the Fisher information of one row of 512 tokens
FISHER_ROWS = 16


@dataclass(frozen=True)
class Prediction:
    """Mean KL divergence in nats per token, and its standard error."""

    kl: float
    se: float


def predicted(loss: float | None, corrects: bool) -> Prediction | None:
    """What a sum of losses lets expect; None where nothing was measured.

    Args:
        corrects: whether later linears make up for what earlier ones have changed.
    """
    if loss is None:
        return None
    share, rise = CORRECTED if corrects else UNCORRECTED
    kl = loss * (share + rise * math.sqrt(loss))
    return Prediction(kl, kl * math.hypot(MODEL_ERROR, ROW_ERROR / math.sqrt(FISHER_ROWS)))
