"""What was written, read again and held against what was meant."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from exlq.errors import FormatError, ModelError, VerifyError
from exlq.evaluation.divergence import Divergence, compare
from exlq.formats.exl2_directory import Exl2Weights
from exlq.models.model import Model
from exlq.pipeline import arithmetic, kinds
from exlq.pipeline.plan import Plan
from exlq.workspace import Workspace

CHECK_TOKENS = 16384  # of held-out rows, on which the finished model is compared with the base
ALLOWED_KL = 0.05
ALLOWED_RATIO = 5.0
LOW_KL, LOW_RATIO = 0.5, 10.0  # likewise where so few bits were asked for that predictions are rough
KNOWS_LITTLE = 0.3  # of ln(vocabulary), where there is no prediction either; to know nothing costs about 0.5


def verify_types(path: Path, wanted: str) -> None:
    """Reads the list of types beside a GGUF file again.

    Raises:
        VerifyError: if it is not the text that was written.
    """
    try:
        same = path.read_text(encoding="utf-8") == wanted
    except (OSError, UnicodeDecodeError):
        same = False
    if not same:
        raise VerifyError(f"{path} is not what was written; check the disk, then run again")


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes."""
    whole = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        whole.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def verify_exl2(model: Model, directory: Path, digests: Mapping[str, str]) -> None:
    """Re-opens an EXL2 directory and compares every tensor with what was to be written.

    Args:
        digests: of the stored tensors of every linear, by key.

    Raises:
        VerifyError: naming the first tensor that differs or is missing.
    """
    try:
        weights = Exl2Weights(directory)
        for key, wanted in digests.items():
            stored = weights.tensors(key)
            bias = stored.pop("bias", None)
            if digest(stored) != wanted or not _same_bias(bias, model.linear_bias(key)):
                raise VerifyError(
                    f"{directory}: {key} is not what was written; check the disk, then run again"
                )
        for name in model.plain_tensors():
            if not torch.equal(weights.read(name), model.weights.read(name).half()):
                raise VerifyError(
                    f"{directory}: {name} is not what was written; check the disk, then run again"
                )
        if more := sorted(set(weights.keys()) - set(model.weights.keys())):
            raise VerifyError(f"{directory} holds {more[0]}, which was not written; run again")
    except (FormatError, ModelError) as exc:
        raise VerifyError(f"the written files cannot be read back: {exc}") from exc


def verify_gguf(paths: Sequence[Path], types: Mapping[str, str], digests: Mapping[str, str]) -> None:
    """Re-opens a GGUF file, all its shards, with the gguf package and compares every tensor.

    Args:
        types: of every tensor, by name; `digests` of their bytes alike.

    Raises:
        VerifyError: naming the first tensor that differs or is missing.
    """
    found: dict[str, tuple[str, str]] = {}
    for path in paths:
        try:
            reader = gguf.GGUFReader(path)
        except (ValueError, OSError) as exc:
            raise VerifyError(f"{path} cannot be read back: {' '.join(str(exc).split())}") from exc
        for tensor in reader.tensors:
            stored = tensor.data.reshape(-1).view(np.uint8)  # mapped, not copied
            found[tensor.name] = tensor.tensor_type.name, hashlib.sha256(stored).hexdigest()
    for name, digest_wanted in digests.items():
        if found.get(name) != (types[name], digest_wanted):
            raise VerifyError(f"{paths[0]}: {name} is not what was written; check the disk, then run again")
    if len(found) != len(digests):
        raise VerifyError(f"{paths[0]} holds {len(found)} tensors, {len(digests)} were written; run again")


def verify_model(plan: Plan, written: Model, workspace: Workspace) -> Divergence:
    """Runs the written model beside the base on rows no Hessian has seen.

    Raises:
        VerifyError: if a weight or a logit is not finite.
    """
    rows, _ = plan.checked_rows()
    rows = rows[: max(1, CHECK_TOKENS // rows.shape[1])]
    try:
        with plan.profile.spent(kinds.FORWARDS, arithmetic.comparison(plan.model, rows)):
            found = compare(plan.model, written, rows, workspace)
    except (FormatError, ModelError) as exc:
        raise VerifyError(f"the written model cannot be run: {exc}") from exc
    if not math.isfinite(found.kl_mean) or not math.isfinite(found.perplexity):
        raise VerifyError("the written model's logits are not finite; report the model")
    return found


def judge(predicted: float | None, measured: float, trusted: bool, vocab_size: int) -> None:
    """Refuses a model that is worse than its measurement and its bits can explain.

    Args:
        predicted, measured: KL divergences; `predicted` is None where nothing was measured.
        trusted: whether so many bits were asked for that a large divergence means a fault.

    Raises:
        VerifyError: if the KL divergence is no number or above the bound of its kind.
    """
    allowed = _allowed(predicted, trusted, vocab_size)
    if not measured <= allowed:
        raise VerifyError(
            f"KL divergence {measured:.4f}, at most {allowed:.4f} was expected: the result is not to be "
            "trusted and was not put in place"
        )


def _allowed(predicted: float | None, trusted: bool, vocab_size: int) -> float:
    if trusted:
        return max(ALLOWED_KL, ALLOWED_RATIO * (predicted or 0.0))
    if predicted is None:
        return max(LOW_KL, KNOWS_LITTLE * math.log(vocab_size))
    return max(LOW_KL, LOW_RATIO * predicted)


def _same_bias(stored: Tensor | None, source: Tensor | None) -> bool:
    if stored is None or source is None:
        return stored is source
    return torch.equal(stored[: len(source)], source.half()) and not stored[len(source) :].any()
