"""Hessians of experts' inputs, taken one expert at a time of what all of them receive."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from exlq.measurement import Measurement
from exlq.models.block import ROUTED, Block
from exlq.models.layout import block_key
from exlq.models.model import Model
from exlq.models.routed import RoutedTokens
from exlq.models.staged import input_of
from exlq.pipeline.passes import TOKENS_AT_ONCE, InputHessians
from exlq.workspace import Workspace

COVERAGE = "experts"  # of a measurement: by block, how many of the calibration's tokens each expert gets
KEPT = "routed"  # the file of what the experts of a block receive

OnTensor = Callable[[str, Tensor], None]
Look = Callable[[str, Tensor], Tensor]


@dataclass
class ExpertInputs:
    """What the experts of block `index` receive, kept in a file while it runs, and who gets which token.

    Their Hessians are then taken one at a time: those of a block would not all fit into memory.
    `heldout` is (n_rows,) bool.
    """

    model: Model
    index: int
    heldout: Tensor
    workspace: Workspace
    _kept: Tensor | None = None
    _chosen: list[Tensor] = field(default_factory=list)
    _routed: RoutedTokens | None = None

    def listener(self, block: Block, rows: slice, others: OnTensor, look: Look) -> OnTensor:
        """For `Block.forward`'s `on_input`, with the rows about to run; `others` gets what is no expert's.

        `look` sees what is kept first.
        """

        def on_input(stage: str, x: Tensor) -> None:
            if stage == ROUTED:
                self._keep(rows, look(stage, x))
                self._chosen.append(block.chosen_experts(x).cpu())
            else:
                others(stage, x)

        return on_input

    def hessians(self, stage: str) -> InputHessians:
        """Of the input of an expert's stage; where its tokens are few, with some that it borrows."""
        (wanted,) = (each for each in self.model.stages(self.index) if each.input_key == stage)
        assert wanted.expert is not None, f"{stage} is no expert's, and was not captured"
        routed, found = self._all(), InputHessians(self.model.device)
        with self.model.part(self.index, wanted.owner) as expert, torch.no_grad():
            weight: Tensor = expert.get_submodule(wanted.own_path).weight  # type: ignore[assignment]
            for tokens in torch.split(routed.tokens(wanted.expert, weight.shape[1]), TOKENS_AT_ONCE):
                x = input_of(expert, expert, wanted.own_path, routed.inputs(tokens).to(weight))
                found.add(x, routed.heldout[tokens])
        return found

    def noted(self, record: Measurement) -> Measurement:
        """The record with the number of tokens that each expert of this block gets, if it has experts."""
        if not self._chosen:
            return record
        routed = self._all()
        count = len({stage.expert for stage in self.model.stages(self.index)} - {None})
        own = [int((routed.own(expert) & ~routed.heldout).sum()) for expert in range(count)]
        known = record.extra.get(COVERAGE, {})
        return replace(record, extra={**record.extra, COVERAGE: {**known, block_key(self.index): own}})

    def _all(self) -> RoutedTokens:
        assert self._kept is not None
        self._routed = self._routed or RoutedTokens(self._kept, torch.cat(self._chosen), self.heldout)
        return self._routed

    def _keep(self, rows: slice, x: Tensor) -> None:
        if self._kept is None:
            self._kept = self.workspace.tensor(KEPT, (len(self.heldout), *x.shape[1:]))
        self._kept[rows] = x.cpu()
