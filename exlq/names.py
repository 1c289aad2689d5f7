"""Names a person gives, known without loading what they stand for; tests hold them against the tables."""

from __future__ import annotations

from typing import Literal

Mode = Literal["spread", "first"]
ROW_MODES: tuple[Mode, ...] = ("spread", "first")  # of `calibration.rows.STARTS`
FORMATS = ("exl2", "gguf")  # of `formats.codecs.CODECS`
HEAD_BITS = (2, 3, 4, 5, 6, 8)  # of `formats.exl2_options.HEAD_OPTIONS`
SEARCHES = ("fast", "best")  # of `formats.gguf_blocks.fit.SEARCHES`
TORCH, LLAMA_CPP = "torch", "llama.cpp"
RUNTIMES = (TORCH, LLAMA_CPP)  # of `evaluate.run.RUNNERS`
STATES = ("float32", "bf16")  # of `pipeline.passes.STATE_DTYPES`
OBJECTIVES = ("kl", "output-error")  # what an allocation minimises the sum of
