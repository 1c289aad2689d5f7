"""What an output takes beside the matrices of the measurement: norms, biases, tokenizer, metadata."""

from __future__ import annotations

import math
from contextlib import suppress

from exlq.errors import InputError
from exlq.pipeline.exl2_output import Exl2Output
from exlq.pipeline.gguf_output import GgufOutput
from exlq.pipeline.plan import Plan

FLOAT16_BYTES = 2


def overhead_bytes(plan: Plan) -> dict[str, int]:
    """Bytes by format, of those that can be made; the embedding counts as a matrix."""
    found = {}
    with suppress(InputError):
        found[Exl2Output.name] = _exl2(plan)
    with suppress(InputError):
        found[GgufOutput.name] = GgufOutput(plan).overhead_bytes()
    return found


def _exl2(plan: Plan) -> int:
    Exl2Output(plan)  # refuses what cannot be made
    model = plan.model
    plain = sum(math.prod(model.weights.shape(name)) for name in model.plain_tensors())
    return FLOAT16_BYTES * (plain - model.embedding.numel)
