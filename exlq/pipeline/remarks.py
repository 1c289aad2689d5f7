"""What was out of the ordinary about the Hessians of a format's linears, kept beside their tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from exlq.files import atomic_write_json, read_json

NAMED = 5  # experts in a line


class Remarks:
    """By linear, how often its damping was raised, how many of its input channels are dead, and few tokens.

    In a file of the work directory, so that a job that goes on after an interruption says the same.
    """

    def __init__(self, work: Path, name: str) -> None:
        self._path = work / f"remarks-{name}.json"
        self._found = self._read()

    def note(self, key: str, raised: int, dead: int, reached: int | None = None) -> None:
        """Remembers what the linear `key` was rounded by, in place of what was remembered of it before.

        `reached` is how many tokens it has of its own, where it is an expert's and they are few.
        """
        counts = [raised, dead, *([] if reached is None else [reached])]
        if counts == self._found.get(key, [0, 0]):
            return
        self._found[key] = counts
        atomic_write_json(self._path, self._found)

    def lines(self) -> tuple[str, ...]:
        """For a summary."""
        raised = {key: counts[0] for key, counts in sorted(self._found.items()) if counts[0]}
        dead = {key: counts[1] for key, counts in sorted(self._found.items()) if counts[1]}
        found = []
        if raised:
            worst = max(raised, key=lambda key: raised[key])
            found.append(
                f"{len(raised)} linears: damping raised up to {10 ** raised[worst]}-fold, most for {worst}, "
                "whose Hessian could not be factored otherwise"
            )
        if dead:
            most = max(dead, key=lambda key: dead[key])
            found.append(
                f"{len(dead)} linears have input channels that no token uses, up to {dead[most]} in "
                f"{most}: their weights were rounded by themselves"
            )
        few = {key.rpartition(".")[0]: counts[2] for key, counts in self._found.items() if counts[2:]}
        return (*found, *([starving(few)] if few else []))

    def _read(self) -> dict[str, list[int]]:
        try:
            return {
                str(key): [int(raised), int(dead), *map(int, few)]
                for key, (raised, dead, *few) in read_json(self._path).items()
            }
        except (OSError, ValueError, TypeError, AttributeError):
            return {}


def starving(few: Mapping[str, int]) -> str:
    """A line that names the experts of fewest tokens, of those that too few reach."""
    fewest = sorted(few, key=lambda name: (few[name], name))[:NAMED]
    named = ", ".join(f"{name} ({few[name]})" for name in fewest)
    more = f" and {len(few) - NAMED} more" if len(few) > NAMED else ""
    return (
        f"{len(few)} experts get fewer tokens than they have input channels and borrow from their block's: "
        f"{named}{more}; more rows (-r) or text of more kinds do better"
    )
