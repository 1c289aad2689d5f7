"""A model run block by block: one block's weights in memory at a time."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from exlq import memory
from exlq.models.ahead import ReadAhead, moved
from exlq.models.block import Block
from exlq.models.calls import Call, record_calls
from exlq.models.canonical import CanonicalWeights
from exlq.models.family import Family, Stage
from exlq.models.finite import FiniteWeights
from exlq.models.head import Head
from exlq.models.layout import EMBEDDING_KEY, HEAD_KEY, NORM_KEY, Layout, Linear, block_key
from exlq.types import LinearSpec, Weights


class Model:
    """A causal language model on `device`, in float32; made by `open_model`.

    `weights` holds the model's tensors under canonical names, each linear's apart.
    """

    def __init__(
        self,
        config: Any,
        family: Family,
        skeleton: Any,
        layout: Layout,
        weights: Weights,
        device: torch.device,
    ) -> None:
        self.config = config
        self.family = family
        self.device = device
        self._given = weights
        self._canonical = CanonicalWeights(weights, layout)
        self.weights: Weights = FiniteWeights(self._canonical)
        self._ahead = ReadAhead(self.weights, self._canonical, device)
        self._last_block = -1
        self._skeleton = skeleton
        self._layout = layout
        self._calls: dict[tuple[int, int], tuple[Call, ...]] = {}
        self._open_block: int | None = None
        self._head = Head(skeleton, self.weights, device)
        self._load(skeleton.model.norm, NORM_KEY)

    def twin(self) -> Model:
        """The same model once more, of which another block can be open."""
        skeleton = copy.deepcopy(self._skeleton)
        return Model(self.config, self.family, skeleton, self._layout, self._given, self.device)

    @property
    def n_blocks(self) -> int:
        return len(self._layout.blocks)

    @property
    def hidden_size(self) -> int:
        return int(self.config.hidden_size)

    @property
    def vocab_size(self) -> int:
        return int(self.config.vocab_size)

    @property
    def max_length(self) -> int:
        """Tokens a row may have at most, as the config says."""
        return int(self.config.max_position_embeddings)

    @property
    def tied(self) -> bool:
        """Whether head and embedding are one stored tensor."""
        return self._canonical.tied

    @property
    def routes(self) -> bool:
        """Whether tokens go to experts: small errors may then send one elsewhere, which no gradient tells."""
        return any(stage.expert is not None for stages in self._layout.stages for stage in stages)

    @property
    def embedding_key(self) -> str:
        return EMBEDDING_KEY

    @property
    def embedding(self) -> LinearSpec:
        return LinearSpec(EMBEDDING_KEY, self.hidden_size, self.vocab_size)

    @property
    def head(self) -> LinearSpec:
        return LinearSpec(HEAD_KEY, self.hidden_size, self.vocab_size)

    def linears(self, index: int) -> tuple[Linear, ...]:
        """The linears of block `index`, in true sequence."""
        return self._layout.blocks[index]

    def share(self, spec: LinearSpec) -> float:
        """The part of all tokens that reaches a linear, on average."""
        return self.family.share(lambda key: getattr(self.config, key, None), spec.key)

    def linear_weight(self, key: str) -> Tensor:
        """(out_features, in_features) in the stored dtype."""
        return self.weights.read(f"{key}.weight")

    def linear_bias(self, key: str) -> Tensor | None:
        """(out_features,) in the stored dtype, None where the linear has no bias."""
        name = f"{key}.bias"
        names = self.weights.keys()
        return self.weights.read(name) if name in names else None

    def plain_tensors(self) -> tuple[str, ...]:
        """Names in `weights` of all that is no linear: embedding and norms, in model order."""
        linears = {linear.spec.key for block in self._layout.blocks for linear in block} | {HEAD_KEY}
        names = self.weights.keys()
        return tuple(name for name in names if name.rpartition(".")[0] not in linears)

    def embed(self, rows: Tensor, weight: Tensor | None = None) -> Tensor:
        """What the first block receives, (n, length, hidden_size) float32, for (n, length) int64 tokens.

        Only the rows of the embedding matrix that occur are read; `weight`, (vocab, hidden_size), takes
        the place of the stored one.
        """
        unique, renumbered = torch.unique(rows.to("cpu"), return_inverse=True)
        stored = self.weights.read(f"{EMBEDDING_KEY}.weight", unique) if weight is None else weight[unique]
        matrix = stored.to(self.device, torch.float32)
        embedding = self._skeleton.model.embed_tokens
        kept = embedding.weight
        embedding.weight = nn.Parameter(matrix, requires_grad=False)
        try:
            hidden = [
                record_calls(self._skeleton, input_ids=row.unsqueeze(0).to(self.device))[0].hidden
                for row in renumbered
            ]
        finally:
            embedding.weight = kept
        return torch.cat(hidden)

    @contextmanager
    def block(self, index: int) -> Iterator[Block]:
        """Block `index` with its weights, which are dropped at the end of the `with`; one at a time."""
        assert self._open_block is None, f"block {self._open_block} is still open"
        module = self._skeleton.model.layers[index]
        self._open_block = index
        try:
            self._load(module, block_key(index))
            self._expect_after(index)
            linears, stages = self._layout.blocks[index], self._layout.stages[index]
            yield Block(module, linears, stages, lambda *shape: self._call(shape)[index], self.device)
        finally:
            _drop(module)
            self._open_block = None
            memory.release()

    @contextmanager
    def part(self, index: int, path: str) -> Iterator[nn.Module]:
        """The module at `path` of block `index` alone, with its weights, dropped at the end of the `with`."""
        assert self._open_block is None, f"block {self._open_block} is still open"
        module: nn.Module = self._skeleton.model.layers[index].get_submodule(path)
        self._open_block = index
        try:
            self._load(module, f"{block_key(index)}.{path}")
            yield module
        finally:
            _drop(module)
            self._open_block = None

    def stages(self, index: int) -> tuple[Stage, ...]:
        """The stages of block `index`, in true sequence."""
        return self._layout.stages[index]

    def final_norm(self, hidden: Tensor) -> Tensor:
        """What lm_head receives for the last block's output, (…, hidden_size)."""
        return self._head.norm(hidden)

    def logits(self, x: Tensor) -> Tensor:
        """(…, vocab) float32 from normed hidden states, soft-capped where the model does that."""
        return self._head.logits(x)

    def head_backward(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Gradient of the summed cross-entropy with respect to the last block's output, before the norm.

        `labels`, (n, length), are each of its own position; -100 leaves a position out.
        """
        return self._head.backward(hidden, labels)

    def sample_labels(self, hidden: Tensor, generator: torch.Generator) -> Tensor:
        """Tokens drawn from the model itself, (n, length) int64, for the last block's output."""
        return self._head.sample_labels(hidden, generator)

    def _call(self, shape: tuple[int, int]) -> tuple[Call, ...]:
        """How every block is called for (batch, length), recorded once per shape."""
        if shape not in self._calls:
            zeros = torch.zeros(*shape, self.hidden_size, device=self.device)
            self._calls[shape] = record_calls(self._skeleton, inputs_embeds=zeros)
        return self._calls[shape]

    def _expect_after(self, index: int) -> None:
        """Blocks are walked one after the other, forth or back: the one that is next is read ahead."""
        following = index + 1 if index > self._last_block else index - 1
        self._last_block = index
        if 0 <= following < self.n_blocks:
            parameters = self._skeleton.model.layers[following].named_parameters()
            names = (f"{block_key(following)}.{name}" for name, _ in parameters)
            self._ahead.expect(part for name in names for part in self._layout.sources(name))

    def _load(self, module: nn.Module, prefix: str) -> None:
        state = {name: self._parameter(f"{prefix}.{name}") for name, _ in module.named_parameters()}
        module.load_state_dict(state, assign=True)

    def _parameter(self, name: str) -> Tensor:
        """A parameter as the skeleton names it, float32 on the device; our own copy, fused where it is."""
        stored = [moved(self._ahead.take(part), self.device) for part in self._layout.sources(name)]
        return stored[0] if len(stored) == 1 else torch.cat(stored)


def _drop(module: nn.Module) -> None:
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            empty = torch.empty_like(parameter, device="meta")
            setattr(owner, name, nn.Parameter(empty, requires_grad=False))
