"""The seam between a job and the formats it writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from exlq.formats.codec import Codec
from exlq.measurement import Measurement
from exlq.models.model import Model
from exlq.pipeline.allocate import Choice
from exlq.pipeline.progress import Progress


class Output(Protocol):
    """One format of one conversion; making it refuses what this format or its target cannot do."""

    name: str

    @property
    def codec(self) -> Codec[Any]: ...

    @property
    def reach(self) -> str:
        """What targets the model admits, in words."""
        ...

    def trusted(self, choice: Choice) -> bool:
        """Whether so many bits were asked for that a large KL divergence means a fault.

        Never where tokens go to experts: that one goes to another is not predicted.
        """
        ...

    def require_place(self) -> None:
        """Raises ConfigError if something of somebody else's stands where the result goes."""
        ...

    def allocate(self, measurement: Measurement | None) -> Choice:
        """One option for every matrix; `measurement` is None where the target needs none."""
        ...

    def estimated_bytes(self) -> int:
        """Bytes of the result, about."""
        ...

    def write(self, choice: Choice, directory: Path, work: Path, progress: Progress) -> None:
        """Quantizes into `directory`, which exists and is empty, and reads all back.

        Raises:
            VerifyError: if what stands there is not what was to be written.
        """
        ...

    def opened(self, directory: Path) -> Model:
        """The written model, to be run in torch."""
        ...

    def put_in_place(self, directory: Path) -> list[Path]:
        """Moves the finished files to where the user wants them; the files or the directory they are now."""
        ...

    def figures(self, choice: Choice) -> dict[str, Any]:
        """What the summary says of this format alone."""
        ...
