"""How many threads the arithmetic takes."""

from __future__ import annotations

import torch

from exlq.errors import ConfigError


def use(threads: int) -> None:
    """Sets the threads of this process.

    Raises:
        ConfigError: for fewer than one.
    """
    if threads < 1:
        raise ConfigError(f"--threads {threads}: at least 1 is wanted")
    torch.set_num_threads(threads)
