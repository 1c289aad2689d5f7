"""What every pass over the blocks shares: hidden states in a file, rows in batches, Hessians of inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from exlq.errors import HessianError
from exlq.models.finite import require_finite
from exlq.models.layout import Linear
from exlq.models.model import Model
from exlq.numerics.hessian import HessianSum
from exlq.pipeline import arithmetic, kinds
from exlq.pipeline.profile import NO_PROFILE, Profile
from exlq.workspace import Workspace

TOKENS_AT_ONCE = 2048  # through a block
STATE_DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


def embedded(
    model: Model,
    ids: Tensor,
    workspace: Workspace,
    dtype: torch.dtype,
    weight: Tensor | None = None,
    name: str = "states",
) -> Tensor:
    """(n_rows, length, hidden_size) memory-mapped: what the first block receives.

    `weight`, (vocab, hidden_size), takes the place of the model's own embedding.
    """
    states = workspace.tensor(name, (*ids.shape, model.hidden_size), dtype)
    for rows in batches(ids):
        states[rows] = model.embed(ids[rows], weight).to("cpu", dtype)
    return states


def rows_at_once(length: int) -> int:
    """Rows that go through a block together."""
    return max(1, TOKENS_AT_ONCE // length)


def batches(ids: Tensor) -> Iterator[slice]:
    """Runs of rows that go through a block together."""
    size = rows_at_once(ids.shape[1])
    for start in range(0, len(ids), size):
        yield slice(start, min(start + size, len(ids)))


@dataclass
class InputHessians:
    """Hessians of one linear input: over the rows for calibration and over those held out."""

    device: torch.device
    calibration: HessianSum | None = None
    heldout: HessianSum | None = None

    def add(self, x: Tensor, heldout: Tensor) -> None:
        """Adds inputs x (rows, length, in_features); `heldout` (rows,) bool says which are of which kind."""
        if self.calibration is None or self.heldout is None:
            self.calibration = HessianSum.zeros(x.shape[-1], self.device)
            self.heldout = HessianSum.zeros(x.shape[-1], self.device)
        for kind, mask in ((self.calibration, ~heldout), (self.heldout, heldout)):
            if mask.any():
                kind.add(x[mask.to(x.device)])

    def means(self, what: str) -> tuple[Tensor, Tensor]:
        """Both Hessians as means; `what` names the input in an error."""
        assert self.calibration is not None
        assert self.heldout is not None
        try:
            return self.calibration.calibrated(), self.heldout.mean()
        except HessianError as exc:
            raise HessianError(f"{what}: {exc}") from exc


@dataclass
class BlockHessians:
    """Hessians of all inputs of a block, filled while it runs."""

    device: torch.device
    profile: Profile = NO_PROFILE
    by_stage: dict[str, InputHessians] = field(default_factory=dict)

    def listener(
        self, heldout: Tensor, look: Callable[[str, Tensor], Tensor] = lambda _, x: x
    ) -> Callable[[str, Tensor], None]:
        """For `Block.forward`'s `on_input`, with the rows that are about to run; `look` sees them first."""

        def add(stage: str, x: Tensor) -> None:
            sums = self.by_stage.setdefault(stage, InputHessians(self.device))
            with self.profile.spent(kinds.HESSIANS, arithmetic.moment(x)):
                sums.add(look(stage, x), heldout)

        return add


def looking(where: str, first: int, row_name: Callable[[int], str]) -> Callable[[str, Tensor], Tensor]:
    """For every stage's input of a batch whose first row is `first`: gives it back, or refuses it.

    What it makes raises ModelError, as `require_finite` does.
    """
    return lambda stage, x: require_finite(x, f"{where}, {stage}", lambda row: row_name(first + row))


def head_hessians(
    model: Model,
    states: Tensor,
    heldout: Tensor,
    ids: Tensor,
    row_name: Callable[[int], str] = "row {}".format,
    profile: Profile = NO_PROFILE,
) -> InputHessians:
    """Hessians of lm_head's input, from the states after the last block."""
    hessians = InputHessians(model.device)
    for rows in batches(ids):
        look = looking("the last block", rows.start, row_name)
        x = look("final norm", model.final_norm(states[rows].float()))
        with profile.spent(kinds.HESSIANS, arithmetic.moment(x)):
            hessians.add(x, heldout[rows])
    return hessians


def linears_by_stage(model: Model, index: int) -> Mapping[str, list[Linear]]:
    """Stage → its linears in block `index`, in true sequence."""
    stages: dict[str, list[Linear]] = {}
    for linear in model.linears(index):
        stages.setdefault(linear.stage, []).append(linear)
    return stages
