"""From the last block's hidden states to logits, labels and the loss's gradient, in chunks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers.modeling_outputs import MoeModelOutputWithPast

from exlq.models.layout import HEAD_KEY
from exlq.models.skeleton import Returns, swapped
from exlq.types import Weights

_WEIGHT_BYTES = 64 << 20
_GPU_SHARE = 16  # the part of a GPU's memory that lm_head may take
_LOGITS_BYTES = 128 << 20  # a backward pass holds a few arrays of this size
_FLOAT_BYTES = 4


def _weight_bytes(device: torch.device) -> int:
    """Of lm_head that are held at once: on a GPU, where reading would take longest, mostly all of it."""
    if device.type != "cuda":
        return _WEIGHT_BYTES
    return max(_WEIGHT_BYTES, torch.cuda.get_device_properties(device).total_memory // _GPU_SHARE)


class Head:
    """The final norm and lm_head; the latter is read in chunks of vocabulary rows and never held whole."""

    def __init__(self, skeleton: Any, weights: Weights, device: torch.device) -> None:
        self._skeleton = skeleton
        self._weights = weights
        self._device = device
        self._vocab_size, hidden_size = weights.shape(f"{HEAD_KEY}.weight")
        self._chunk_rows = max(1, _weight_bytes(device) // (_FLOAT_BYTES * hidden_size))
        self._chunk_tokens = max(1, _LOGITS_BYTES // (_FLOAT_BYTES * self._vocab_size))
        self._held: tuple[int, Tensor] | None = None

    def norm(self, hidden: Tensor) -> Tensor:
        """What lm_head receives for the last block's output, (…, hidden_size)."""
        with torch.no_grad():
            normed: Tensor = self._skeleton.model.norm(hidden.to(self._device, torch.float32))
        return normed

    def logits(self, x: Tensor) -> Tensor:
        """(…, vocab) float32 from `norm`'s result, with whatever the model does after its head."""
        with torch.no_grad():
            x = x.to(self._device, torch.float32)
            raw = self._multiply(x.flatten(0, -2))
            return self._finish(raw).reshape(*x.shape[:-1], -1)

    def sample_labels(self, hidden: Tensor, generator: torch.Generator) -> Tensor:
        """Tokens drawn from the model's own distribution, (n, length) int64, for (n, length, hidden_size)."""
        labels = torch.empty(hidden.shape[:-1].numel(), dtype=torch.int64)
        for tokens, x in self._tokens(hidden):
            cumulative = self.logits(self.norm(x)).softmax(-1).cumsum(-1)
            drawn = torch.rand(len(x), 1, generator=generator, device=generator.device).to(cumulative)
            found = torch.searchsorted(cumulative, drawn * cumulative[:, -1:], right=True)
            labels[tokens] = found.squeeze(-1).clamp_(max=self._vocab_size - 1).cpu()
        return labels.reshape(hidden.shape[:-1])

    def backward(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Gradient of the summed cross-entropy with respect to the last block's output.

        `hidden` is (n, length, hidden_size), `labels` (n, length), each the label of its own
        position; -100 leaves a position out.
        """
        grad = torch.empty_like(hidden.flatten(0, -2), dtype=torch.float32, device=self._device)
        flat = labels.flatten().to(self._device)
        for tokens, x in self._tokens(hidden):
            grad[tokens] = self._backward(x, flat[tokens])
        return grad.reshape(hidden.shape)

    def _backward(self, hidden: Tensor, labels: Tensor) -> Tensor:
        with torch.enable_grad():
            hidden = hidden.detach().requires_grad_()
            x = self._skeleton.model.norm(hidden)
            raw = self._multiply(x.detach()).requires_grad_()
            loss = F.cross_entropy(self._finish(raw), labels, reduction="sum")
            (grad_raw,) = torch.autograd.grad(loss, raw)
            grad_x = torch.zeros_like(x)
            for rows, weight in self._chunks():
                grad_x += grad_raw[:, rows] @ weight
            (grad,) = torch.autograd.grad(x, hidden, grad_x)
        return grad

    def _tokens(self, hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
        flat = hidden.flatten(0, -2)  # (tokens, hidden_size)
        for start in range(0, len(flat), self._chunk_tokens):
            tokens = slice(start, start + self._chunk_tokens)
            yield tokens, flat[tokens].to(self._device, torch.float32)

    def _multiply(self, x: Tensor) -> Tensor:
        """lm_head alone: (tokens, hidden_size) to (tokens, vocab)."""
        with torch.no_grad():
            raw = x.new_empty(len(x), self._vocab_size)
            for rows, weight in self._chunks():
                raw[:, rows] = x @ weight.T
        return raw

    def _chunks(self) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, self._vocab_size, self._chunk_rows):
            rows = slice(start, min(start + self._chunk_rows, self._vocab_size))
            if self._held is None or self._held[0] != start:
                self._held = None
                weight = self._weights.read(f"{HEAD_KEY}.weight", rows)
                self._held = (start, weight.to(self._device).to(torch.float32))
            yield rows, self._held[1]

    def _finish(self, raw: Tensor) -> Tensor:
        """What the real forward does to (tokens, vocab) after lm_head, run with stand-ins for all before."""
        backbone = Returns(MoeModelOutputWithPast(last_hidden_state=raw.unsqueeze(0)))
        with swapped(self._skeleton, model=backbone, lm_head=Returns(raw.unsqueeze(0))):
            logits: Tensor = self._skeleton(inputs_embeds=raw, use_cache=False).logits
        return logits.squeeze(0)
