"""Sizes of files as people write them: `4.2GiB`, `512 MB`, plain bytes."""

from __future__ import annotations

import re
from decimal import ROUND_FLOOR, Context, Decimal

from exlq.errors import ConfigError

UNITS = {
    "": 1,
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", start=1)},
    **{f"{prefix}IB": 1024**power for power, prefix in enumerate("KMGT", start=1)},
}
SIZE = re.compile(r"([0-9]{1,18}(?:\.[0-9]{0,18})?|\.[0-9]{1,18})\s*([A-Za-z]*)")
EXACT = Context(prec=60)  # digits of the longest number SIZE lets through times the largest unit
BINARY = ("B", "KiB", "MiB", "GiB", "TiB")


def parse_bytes(text: str) -> int:
    """Whole bytes of a size, a fraction of a byte dropped: KB, MB, GB, TB are powers of 1000, KiB … of 1024.

    Raises:
        ConfigError: for anything else, and for less than one byte.
    """
    found = SIZE.fullmatch(text.strip())
    unit = UNITS.get(found[2].upper()) if found else None
    if found is None or unit is None:
        raise ConfigError(
            f"{text!r} is no size; want bytes or a number with KB, MB, GB, TB, KiB, MiB, GiB or TiB"
        )
    size = int(EXACT.multiply(Decimal(found[1]), Decimal(unit)).to_integral_value(ROUND_FLOOR))
    if size < 1:
        raise ConfigError(f"{text!r} is less than one byte; want a size above 0")
    return size


def format_bytes(n_bytes: int) -> str:
    """A size to three digits or more in the largest binary unit it fills: `512 B`, `4.20 GiB`."""
    power = min((max(n_bytes, 1).bit_length() - 1) // 10, len(BINARY) - 1)
    if power == 0:
        return f"{n_bytes} B"
    return f"{n_bytes / 1024**power:.2f} {BINARY[power]}"
