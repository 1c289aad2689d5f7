"""exlq: calibrated mixed-precision quantization of causal language models."""

__version__ = "0.1.0"
