"""Which compiled loops there are for a tensor: numba's on the CPU, Triton's on a GPU."""

from __future__ import annotations

import os
from importlib.util import find_spec

from torch import Tensor

COMPILED = find_spec("numba") is not None
TRITON = find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's own way to run kernels on the CPU: tests


def for_triton(x: Tensor) -> bool:
    """Whether loops over `x` are Triton's."""
    return TRITON and (x.is_cuda or INTERPRETED)
