"""How much the model's predictions suffer from an error at each linear's outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from exlq.calibration import TokenRows
from exlq.errors import HessianError
from exlq.files import atomic_write_bytes
from exlq.models.model import Model
from exlq.numerics.coupling import Coupling, CouplingSum
from exlq.numerics.hessian import HessianSum
from exlq.pipeline import arithmetic, kinds
from exlq.pipeline.information import head_information, information
from exlq.pipeline.passes import looking
from exlq.pipeline.profile import NO_PROFILE, Profile
from exlq.pipeline.progress import Progress
from exlq.workspace import Workspace

TOKENS = 8192  # gradients are taken on
ROW_LENGTH = 512  # longer rows are cut
TOKENS_AT_ONCE = 1024  # through a block and its graph


@dataclass(frozen=True)
class Sensitivity:
    """What errors cost, to second order, in the units of a KL divergence in nats per token.

    An output's mean squared error costs half of its Fisher information; an error e of a token's
    embedding costs half of eᵀGe.
    """

    outputs: Mapping[str, Tensor]  # by canonical key, lm_head too: (out_features,) float32
    embedding: Tensor  # G = E[g gᵀ], (hidden, hidden) float32, over the gradients of the embedded tokens
    head_input: Tensor  # E[x xᵀ], (hidden, hidden) float32, of what lm_head receives
    path: Path  # where it lies; what is known of the outputs' gradients together lies beside it

    def save(self) -> None:
        tensors = {f"outputs/{key}": tensor for key, tensor in self.outputs.items()}
        _save({**tensors, "embedding": self.embedding, "head_input": self.head_input}, self.path)

    @classmethod
    def load(cls, path: Path) -> Sensitivity:
        tensors = dict(load_file(path))
        embedding, head_input = tensors.pop("embedding"), tensors.pop("head_input")
        outputs = {name.removeprefix("outputs/"): tensor for name, tensor in tensors.items()}
        return cls(outputs, embedding, head_input, path)

    def coupling(self, key: str, device: torch.device) -> Coupling | None:
        """How the output rows of a linear hang together; None for lm_head, whose rows do not, almost."""
        path = _beside(self.path, key)
        return Coupling.of(load_file(path), device) if path.exists() else None


def _beside(path: Path, key: str) -> Path:
    """The file of one linear's coupling."""
    return path.with_name(f"{key}-{path.name}")


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    atomic_write_bytes(path, save(tensors))


def indifferent(model: Model, path: Path) -> Sensitivity:
    """What stands in for the gradients' where none are taken: every output and channel costs the same."""
    specs = [linear.spec for index in range(model.n_blocks) for linear in model.linears(index)]
    outputs = {spec.key: torch.ones(spec.out_features) for spec in (*specs, model.head)}
    return Sensitivity(outputs, torch.eye(model.hidden_size), torch.eye(model.hidden_size), path)


def fisher_rows(ids: Tensor) -> Tensor:
    """The token rows of the gradient pass: evenly spread over `ids` (n, length), at most 8192 tokens."""
    return ids[_places(ids), : min(ROW_LENGTH, ids.shape[1])]


def row_namer(taken: TokenRows) -> Callable[[int], str]:
    """What the rows are called that `fisher_rows` takes of those that are not held out."""
    calibrated = (~taken.heldout).nonzero()[:, 0]
    places = calibrated[_places(taken.ids[calibrated])]
    return lambda row: taken.row_name(int(places[row]))


def _places(ids: Tensor) -> Tensor:
    length = min(ROW_LENGTH, ids.shape[1])
    n_rows = min(len(ids), max(1, TOKENS // length))
    return torch.linspace(0, len(ids) - 1, n_rows).round().long()


def fisher(
    model: Model,
    rows: Tensor,
    workspace: Workspace,
    seed: int,
    path: Path,
    progress: Progress,
    row_name: Callable[[int], str] = "row {}".format,
    profile: Profile = NO_PROFILE,
) -> Sensitivity:
    """Fisher information of every linear's outputs, and the gradients' second moment at the input.

    Labels are sampled from the model, one per position. The pass runs block by block, forth with
    every block's input kept in a file, then back. An interrupted one goes on after the last block.

    Args:
        rows: (n, length) int64.
        workspace: what is there of these names is of the same rows, model and seed.
        path: where all of it is saved, several files of that name's end.
        row_name: what a row is called in an error.

    Raises:
        ModelError: naming block, stage and row, if the activations are not finite.

    Source: Fisher information as the KL's Hessian; K-FAC, arXiv:1503.05671, section 2 (sampled labels).
    """
    at_once = max(1, TOKENS_AT_ONCE // rows.shape[1])
    batches = [slice(start, start + at_once) for start in range(0, len(rows), at_once)]
    inputs = _block_inputs(model, rows, batches, workspace, progress, row_name, profile)
    with profile.spent(kinds.FORWARDS, arithmetic.head(model, inputs[-1])):
        outputs = {model.head.key: head_information(model, inputs[-1])}
    head_input = _second_moment((model.final_norm(inputs[-1][batch]) for batch in batches), "final norm")
    back = _Backward(model, inputs, batches, workspace, path, row_name, profile)
    reached = next((i for i in range(model.n_blocks) if workspace.has(_gradient(i), back.shape)), None)
    if reached is None:
        with profile.spent(kinds.BACKWARDS, arithmetic.head(model, inputs[-1], 3)):
            gradient, reached = back.at_head(seed), model.n_blocks
    else:
        gradient = workspace.tensor(_gradient(reached), back.shape)
    for index in reversed(range(reached)):
        gradient = back.through(index, gradient)
        progress("gradients", 2 * model.n_blocks - index, 2 * model.n_blocks)
    for index in range(model.n_blocks):
        outputs |= load_file(back.information_file(index))
    scale = _embedding_scale(model, rows[:1], inputs[0][:1])
    embedding = _second_moment((gradient[batch] for batch in batches), "embedding, gradients") * scale**2
    found = Sensitivity(outputs, embedding, head_input, path)
    found.save()
    back.remove()
    return found


@dataclass(frozen=True)
class _Backward:
    """The way back through the blocks; what each has left is in files, whole or not there."""

    model: Model
    inputs: list[Tensor]
    batches: list[slice]
    workspace: Workspace
    path: Path
    row_name: Callable[[int], str]
    profile: Profile

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.inputs[-1].shape)

    def information_file(self, index: int) -> Path:
        """The file of a block's Fisher information."""
        return self.workspace.directory / f"block-{index}-{self.path.name}"

    def at_head(self, seed: int) -> Tensor:
        """The gradient of the last hidden states."""
        labels = self.model.sample_labels(self.inputs[-1], torch.Generator().manual_seed(seed))

        def fill(gradient: Tensor) -> None:
            for batch in self.batches:
                gradient[batch] = self.model.head_backward(self.inputs[-1][batch], labels[batch]).cpu()

        return self.workspace.whole(_gradient(self.model.n_blocks), self.shape, fill)

    def through(self, index: int, after: Tensor) -> Tensor:
        """The gradient of a block's input from that of its output, whose file goes."""

        def fill(gradient: Tensor) -> None:
            gradient.copy_(after)
            found = self._block_information(index, gradient)
            for batch in self.batches:
                looking(f"block {index}", batch.start, self.row_name)("gradient", gradient[batch])
            _save(found, self.information_file(index))

        gradient = self.workspace.whole(_gradient(index), self.shape, fill)
        self.workspace.remove(_gradient(index + 1))
        return gradient

    def _block_information(self, index: int, gradient: Tensor) -> dict[str, Tensor]:
        """Mean squared gradient per output of the block's linears; moves `gradient` to the block's input."""
        sums: dict[str, CouplingSum] = {}
        inputs, adding, spent = self.inputs[index], _adding(sums, self.profile), self.profile.spent
        with self.profile.reading(self.model.block(index)) as block:
            for batch in self.batches:
                with spent(kinds.BACKWARDS, arithmetic.backward(self.model, index, inputs[batch])):
                    gradient[batch] = block.backward(inputs[batch], gradient[batch], adding).cpu()
        n_tokens = inputs.shape[:2].numel()
        for key, total in sums.items():
            if total.couples(n_tokens):
                _save(total.over(n_tokens).stored(), _beside(self.path, key))
        return information(self.model.linears(index), sums, n_tokens)

    def remove(self) -> None:
        for index in range(self.model.n_blocks + 1):
            self.workspace.remove(_input(index))
            self.workspace.remove(_gradient(index))
            self.information_file(index).unlink(missing_ok=True)


def _input(index: int) -> str:
    """What goes into a block, or comes out of the last."""
    return f"input-{index}"


def _gradient(index: int) -> str:
    """Its gradient."""
    return f"gradient-{index}"


def _second_moment(parts: Iterable[Tensor], what: str) -> Tensor:
    """(size, size) float32 E[x xᵀ] over all x of (…, size) tensors; `what` names them in an error."""
    total: HessianSum | None = None
    for part in parts:
        total = total or HessianSum.zeros(part.shape[-1], part.device)
        total.add(part)
    assert total is not None
    try:
        return total.mean().cpu()
    except HessianError as exc:
        raise HessianError(f"{what}: {exc}") from exc


def _embedding_scale(model: Model, rows: Tensor, embedded: Tensor) -> float:
    """What the model multiplies its embeddings with, as Gemma does."""
    stored = model.weights.read(f"{model.embedding_key}.weight", rows.flatten()).float()
    return float(embedded.norm() / stored.norm().clamp_min(1e-30))


def _block_inputs(
    model: Model,
    rows: Tensor,
    batches: list[slice],
    workspace: Workspace,
    progress: Progress,
    row_name: Callable[[int], str],
    profile: Profile,
) -> list[Tensor]:
    """Hidden states (n, length, hidden_size) before each block and after the last."""
    shape = (*rows.shape, model.hidden_size)

    def embed(states: Tensor) -> None:
        for batch in batches:
            states[batch] = model.embed(rows[batch]).cpu()

    states = [workspace.whole(_input(0), shape, embed)]
    for index in range(model.n_blocks):

        def run(after: Tensor, index: int = index) -> None:
            with profile.reading(model.block(index)) as block:
                for batch in batches:
                    look = looking(f"block {index}", batch.start, row_name)
                    with profile.spent(kinds.FORWARDS, arithmetic.forward(model, index, rows[batch])):
                        after[batch] = block.forward(states[index][batch], _only(look)).cpu()

        states.append(workspace.whole(_input(index + 1), shape, run))
        progress("gradients", index + 1, 2 * model.n_blocks)
    for batch in batches:
        looking("the last block", batch.start, row_name)("output", states[-1][batch])
    return states


def _only(look: Callable[[str, Tensor], Tensor]) -> Callable[[str, Tensor], None]:
    def on_input(stage: str, x: Tensor) -> None:
        look(stage, x)

    return on_input


def _adding(sums: dict[str, CouplingSum], profile: Profile) -> Callable[[str, Tensor], None]:
    def add(key: str, gradient: Tensor) -> None:
        if key not in sums:
            sums[key] = CouplingSum.zeros(gradient.shape[-1], gradient.device)
        with profile.spent(kinds.COUPLING, arithmetic.coupling(gradient)):
            sums[key].add(gradient)

    return add
