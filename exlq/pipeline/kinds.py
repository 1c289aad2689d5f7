"""What a profile calls the kinds of work of a conversion."""

from __future__ import annotations

READING = "reading weights"
WRITING = "writing, reading back"
FORWARDS = "forwards"
BACKWARDS = "forwards and back"
HESSIANS = "Hessians"
DRIFT = "drift sums"
COUPLING = "gradients' moments"
FACTORS = "factors"
CORRECTIONS = "corrections"
SCALES = "scales before sweeps"
TRIALS = "trial sweeps"
SWEEPS = "final sweeps"
DESCENTS = "descents"
REST = "the rest"
KINDS = (
    *(READING, FORWARDS, BACKWARDS, HESSIANS, DRIFT, COUPLING, FACTORS, CORRECTIONS),
    *(SCALES, TRIALS, SWEEPS, DESCENTS, WRITING, REST),
)
IN_FLOAT64 = (FACTORS,)  # the others are floored at the rate of float32
ELSEWHERE = "elsewhere"  # the stage of what is in none
