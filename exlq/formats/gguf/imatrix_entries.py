"""What an importance matrix says: the squares of the activations each weight was multiplied with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from exlq.errors import ModelError


@dataclass(frozen=True, eq=False)
class Entry:
    """Sums over tokens of one tensor's squared inputs; `n_mat` is the number of experts, 1 for a matrix.

    A legacy file does not tell experts apart: its entries have n_mat = 1 and all experts' inputs in a row,
    and count chunks instead of tokens.
    """

    sums: Tensor  # (n_mat, n_in) float32, activation²
    counts: Tensor  # (n_mat,) float32, whole numbers of tokens


@dataclass(frozen=True, eq=False)
class Imatrix:
    """An importance matrix; `entries` go by the GGUF name of the weight, `blk.0.ffn_down.weight`.

    Raises:
        ModelError: made of no entry, or of one whose values are not finite, negative or of a wrong shape.
    """

    entries: Mapping[str, Entry]
    datasets: tuple[str, ...] = ()
    chunk_count: int = 0
    chunk_size: int = 0  # tokens, 0 if not known

    def __post_init__(self) -> None:
        if not self.entries:
            raise ModelError("an importance matrix has no entry; want one for each weight")
        for name, entry in self.entries.items():
            _check(name, entry)

    def importance(self, name: str) -> Tensor | None:
        """Mean of the squared inputs: (n_in,), or (n_mat, n_in) for experts; None without an entry.

        Ones for an expert no token reached, as llama-quantize takes it.
        """
        entry = self.entries.get(name)
        if entry is None:
            return None
        counts = entry.counts.unsqueeze(-1)  # (n_mat, 1)
        mean = torch.where(counts > 0, entry.sums / counts.clamp(min=1), 1.0)
        return mean.squeeze(0)

    def importance_for(self, name: str, shape: Sequence[int]) -> Tensor | None:
        """`importance` for a weight of torch's `shape`, (out, n_in) or (n_mat, out, n_in).

        Returns:
            (n_in,) or (n_mat, n_in); None without an entry.

        Raises:
            ModelError: if the entry is of other inputs.
        """
        found = self.importance(name)
        wanted = (*shape[:-2], shape[-1])
        if found is None or tuple(found.shape) == wanted:
            return found
        if found.numel() != math.prod(wanted):
            raise ModelError(
                f"the importance matrix has {tuple(found.shape)} values for {name}, want {wanted}; "
                "use one made for this model"
            )
        return found.reshape(wanted)


def _check(name: str, entry: Entry) -> None:
    sums, counts = entry.sums, entry.counts
    if sums.ndim != 2 or counts.ndim != 1 or len(sums) != len(counts) or not sums.numel():
        raise ModelError(
            f"{name} has sums of shape {tuple(sums.shape)} and counts of {tuple(counts.shape)} in the "
            "importance matrix; want (n_mat, n_in) and (n_mat,)"
        )
    for what, values in (("sums", sums), ("counts", counts)):
        if values.dtype != torch.float32:
            raise ModelError(
                f"{name} has {what} of {values.dtype} in the importance matrix, want torch.float32"
            )
        bad = int((~(values.isfinite() & (values >= 0))).sum())
        if bad:
            raise ModelError(
                f"{name} has {bad} of {values.numel()} {what} in the importance matrix that are negative or "
                "not finite; measure it again"
            )
