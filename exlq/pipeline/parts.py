"""What of a matrix, and how many options of it, one sweep takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from exlq.types import Option

SWEEP_BYTES = 192 << 20  # working arrays of one sweep
GPU_SWEEP = 10  # times as much on a GPU, where a sweep takes the same time for few weights as for many
FEWEST_ROWS = 1024  # fewer in one sweep and the multipliers of its groups rest on too little
ROWS_LOOKED_AT = 1024  # at once, for their largest weights


def parts(weight: Tensor, perm: Tensor, n_options: int) -> list[Tensor]:
    """Output rows (n,) int64 of each sweep of `weight`, (out, in); every part has rows from all over it.

    The first, whose multipliers the others take over, also has the rows with the largest weights: one
    for every run of channels of the processing order `perm`. Without them the others would be clipped.
    """
    out, in_features = weight.shape
    n_parts = -(-out // max(32, _rows_at_once(in_features, n_options, perm.device)))
    if n_parts == 1:
        return [torch.arange(out)]
    size = -(-out // n_parts)
    first = _reaching_rows(weight, perm, size // 2)
    others = _without(torch.arange(out), first)
    fill = others[torch.linspace(0, len(others) - 1, size - len(first)).long()]
    others = _without(others, fill)
    return [torch.cat([first, fill]), *(others[part :: n_parts - 1] for part in range(n_parts - 1))]


def _reaching_rows(weight: Tensor, perm: Tensor, most: int) -> Tensor:
    """The row with the largest weight in every run of 32 channels of `perm`, or more: at most `most` rows."""
    run = 32 * max(1, -(-len(perm) // (32 * most)))
    order = torch.nn.functional.pad(perm.cpu(), (0, -len(perm) % run), value=int(perm[-1]))
    reach = [
        rows.cpu()[:, order].abs().view(len(rows), -1, run).amax(2)  # (rows, runs)
        for rows in torch.split(weight, ROWS_LOOKED_AT)
    ]
    return torch.tensor(sorted(set(torch.cat(reach).argmax(0).tolist())))


def _without(rows: Tensor, dropped: Tensor) -> Tensor:
    return rows[~torch.isin(rows, dropped)]


def _rows_at_once(in_features: int, n_options: int, device: torch.device) -> int:
    most = SWEEP_BYTES if device.type == "cpu" else GPU_SWEEP * SWEEP_BYTES
    return most // (in_features * n_options * 8)


def option_batches(
    options: Sequence[Option], in_features: int, device: torch.device
) -> Iterator[Sequence[Option]]:
    """Runs of options that are swept together: alike in number, and on a CPU as many for every thread."""
    most = max(1, _rows_at_once(in_features, 1, device) // FEWEST_ROWS)
    workers = min(torch.get_num_threads(), len(options)) if device.type == "cpu" else 1
    runs = -(-len(options) // most)
    at_once = -(-len(options) // (-(-runs // workers) * workers))
    for start in range(0, len(options), at_once):
        yield options[start : start + at_once]
