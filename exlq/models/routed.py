"""Which tokens an expert's Hessians are taken of: those sent to it, and some others where they are few."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil

import torch
from torch import Tensor


class RoutedTokens:
    """What the experts of a block receive, and who gets which token.

    An expert that fewer tokens reach than it has input channels borrows the rest from the other tokens of the
    block, evenly spread. Their inputs are what this expert would make of them, so its Hessian is drawn
    towards the block's, the more the fewer tokens it has of its own: with n of these and k borrowed,
    H = (n H_own + k H_block) / (n + k), k = channels - n. docs/reliability.md has what that is worth.

    Args:
        x: (n_rows, length, hidden) what all experts together receive, mapped from a file or not.
        chosen: (n_rows * length, per_token) the experts of every token.
        heldout: (n_rows,) bool, where the rows are of two kinds; tokens are borrowed of each apart.
    """

    def __init__(self, x: Tensor, chosen: Tensor, heldout: Tensor | None = None) -> None:
        self.length = x.shape[1]
        self._x = x.view(-1, x.shape[-1])
        self._chosen = chosen
        kinds = torch.zeros(len(x), dtype=torch.bool) if heldout is None else heldout
        self.heldout = kinds.repeat_interleave(self.length)  # (n_rows * length,)

    def own(self, expert: int) -> Tensor:
        """(n_rows * length,) bool: the tokens sent to an expert."""
        return (self._chosen == expert).any(1)

    def reached(self, expert: int, in_features: int) -> int | None:
        """How many tokens an expert has of its own, None where they are enough for so many channels."""
        n = int(self.own(expert).sum())
        return n if n < in_features else None

    def tokens(self, expert: int, in_features: int) -> Tensor:
        """(n,) int64, rising: the expert's own tokens and those it borrows for so many channels."""
        taken = self.own(expert)
        for kind in (self.heldout, ~self.heldout):
            others = (kind & ~taken).nonzero()[:, 0]
            share = float(kind.float().mean())
            n = min(max(0, ceil(share * in_features) - int((kind & taken).sum())), len(others))
            if n:
                taken[others[torch.linspace(0, len(others) - 1, n).long()]] = True
        return taken.nonzero()[:, 0]

    def batches(self, expert: int, in_features: int, batch_rows: int) -> Iterator[tuple[slice, Tensor]]:
        """Runs of rows, and which of all tokens are the expert's in them, (n,) int64."""
        tokens = self.tokens(expert, in_features)
        n_rows = len(self.heldout) // self.length
        edges = [*range(0, n_rows, batch_rows), n_rows]
        cuts = torch.searchsorted(tokens, torch.tensor(edges) * self.length).tolist()
        for start, stop, begin, end in zip(edges, edges[1:], cuts, cuts[1:], strict=False):
            yield slice(start, stop), tokens[begin:end]

    def inputs(self, tokens: Tensor) -> Tensor:
        """(n, hidden) what the experts receive for these tokens."""
        return self._x[tokens]
