"""The calibration text that comes with the package."""

from __future__ import annotations

from pathlib import Path

from exlq.errors import CalibrationError

_NAME = "default.parquet"
_PACKAGE = Path(__file__).resolve().parent


def default_calibration() -> Path:
    """The bundled parquet file: in `exlq/data` of an installed wheel, in `calibration` of a clone.

    Raises:
        CalibrationError: if neither place holds it.
    """
    places = (_PACKAGE / "data" / _NAME, _PACKAGE.parent / "calibration" / _NAME)
    for path in places:
        if path.is_file():
            return path
    raise CalibrationError(
        f"the bundled calibration file is at neither {places[0]} nor {places[1]}; "
        "install the package again or name a file with -c"
    )
