"""exlq: calibrated mixed-precision quantization of causal language models."""

import os

# Threads of torch that spin while they wait are several times slower where other programs use the cores.
# The OpenMP runtime reads this when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"
