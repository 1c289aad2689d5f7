"""The widest floats a device computes in."""

from __future__ import annotations

import torch


def widest(device: torch.device) -> torch.dtype:
    """float64, but float32 on Apple's GPUs, which have no other."""
    return torch.float32 if device.type == "mps" else torch.float64
