"""Models by their true shapes, and types of their tensors written short, for the frozen recipes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby

from exlq.formats.gguf.recipes import Shape
from exlq.formats.gguf.values import TensorInfo

NAMES = (
    "Q2_K Q2_K_S Q3_K_S Q3_K_M Q3_K_L Q4_0 Q4_1 Q4_K_S Q4_K_M Q5_0 Q5_1 Q5_K_S Q5_K_M Q6_K Q8_0 "
    "IQ4_NL IQ4_XS F16 BF16 F32"
).split()


@dataclass(frozen=True)
class Model:
    architecture: str
    n_blocks: int
    hidden: int
    ffn: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab: int
    tied: bool = False
    fused: bool = False  # attn_qkv, and gate and up in one
    n_experts: int = 0
    extra_norms: tuple[str, ...] = ()
    gated: bool = True

    @property
    def shape(self) -> Shape:
        return Shape(self.architecture, self.n_blocks, self.n_heads, self.n_kv_heads, self.n_experts)

    def tensors(self) -> list[TensorInfo]:
        """Names and shapes as llama.cpp's converter writes them."""
        shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (self.vocab, self.hidden)}
        for block in range(self.n_blocks):
            shapes |= {f"blk.{block}.{name}.weight": shape for name, shape in self._block().items()}
        shapes["output_norm.weight"] = (self.hidden,)
        if not self.tied:
            shapes["output.weight"] = (self.vocab, self.hidden)
        return [TensorInfo(name, shape, "F16") for name, shape in shapes.items()]

    def _block(self) -> dict[str, tuple[int, ...]]:
        q, kv = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        norms = dict.fromkeys(["attn_norm", "ffn_norm", *self.extra_norms], (self.hidden,))
        attention: dict[str, tuple[int, ...]] = {
            "attn_q": (q, self.hidden),
            "attn_k": (kv, self.hidden),
            "attn_v": (kv, self.hidden),
        }
        if self.fused:
            attention = {"attn_qkv": (q + 2 * kv, self.hidden)}
        return {**norms, **attention, "attn_output": (self.hidden, q), **self._mlp()}

    def _mlp(self) -> dict[str, tuple[int, ...]]:
        if self.n_experts:
            n = self.n_experts
            return {
                "ffn_gate_inp": (n, self.hidden),
                "ffn_gate_exps": (n, self.ffn, self.hidden),
                "ffn_up_exps": (n, self.ffn, self.hidden),
                "ffn_down_exps": (n, self.hidden, self.ffn),
            }
        up = 2 * self.ffn if self.fused and self.gated else self.ffn
        mlp: dict[str, tuple[int, ...]] = {"ffn_up": (up, self.hidden), "ffn_down": (self.hidden, self.ffn)}
        if self.gated and not self.fused:
            mlp["ffn_gate"] = (self.ffn, self.hidden)
        return mlp


NORMS = ("attn_q_norm", "attn_k_norm")
GEMMA = ("post_attention_norm", "post_ffw_norm")
MODELS = {
    "Llama-3-8B": Model("llama", 32, 4096, 14336, 32, 8, 128, 128256),
    "Llama-3-70B": Model("llama", 80, 8192, 28672, 64, 8, 128, 128256),
    "Llama-2-7B": Model("llama", 32, 4096, 11008, 32, 32, 128, 32000),
    "Llama-3.2-1B": Model("llama", 16, 2048, 8192, 32, 8, 64, 128256, tied=True),
    "Qwen2.5-0.5B": Model("qwen2", 24, 896, 4864, 14, 2, 64, 151936, tied=True),
    "Qwen2.5-7B": Model("qwen2", 28, 3584, 18944, 28, 4, 128, 152064),
    "Qwen2.5-72B": Model("qwen2", 80, 8192, 29568, 64, 8, 128, 152064),
    "Gemma-2-2b": Model("gemma2", 26, 2304, 9216, 8, 4, 256, 256000, tied=True, extra_norms=GEMMA),
    "Phi-3-mini": Model("phi3", 32, 3072, 8192, 32, 32, 96, 32064, fused=True),
    "Mistral-7B": Model("llama", 32, 4096, 14336, 32, 8, 128, 32768),
    "Mixtral-8x7B": Model("llama", 32, 4096, 14336, 32, 8, 128, 32000, n_experts=8),
    "Qwen3-30B-A3B": Model("qwen3moe", 48, 2048, 768, 32, 4, 128, 151936, n_experts=128, extra_norms=NORMS),
    "TinyLlama of 4 blocks": Model("llama", 4, 2048, 5632, 32, 4, 64, 32000),
    "rows of 144 and 200": Model("llama", 9, 144, 200, 4, 2, 36, 512),  # 144 = 4.5 · 32
    "Falcon-7B": Model("falcon", 32, 4544, 18176, 71, 1, 64, 65024, fused=True, gated=False),
    "Falcon of rows of 256": Model("falcon", 32, 4096, 16384, 64, 8, 64, 65024, fused=True, gated=False),
}

LETTERS = {
    "F32": "f",
    "F16": "h",
    "BF16": "b",
    "Q4_0": "A",
    "Q4_1": "B",
    "Q5_0": "C",
    "Q5_1": "D",
    "Q8_0": "8",
    "Q2_K": "2",
    "Q3_K": "3",
    "Q4_K": "4",
    "Q5_K": "5",
    "Q6_K": "6",
    "IQ4_NL": "n",
    "IQ4_XS": "x",
}


def packed(types: Mapping[str, str], model: Model) -> dict[str, str]:
    """Kind of tensor -> a letter per block, runs counted: `6*3 4*2`. Kinds kept F32 are left out."""
    kinds: dict[str, list[str]] = {}
    for tensor in model.tensors():
        kind = re.sub(r"^blk\.\d+\.", "", tensor.name).removesuffix(".weight")
        if types[tensor.name] != "F32" or len(tensor.shape) > 1:
            kinds.setdefault(kind, []).append(LETTERS[types[tensor.name]])
    return {
        kind: " ".join(_run(letter, len(list(same))) for letter, same in groupby(letters))
        for kind, letters in kinds.items()
    }


def _run(letter: str, count: int) -> str:
    return letter if count == 1 else f"{letter}*{count}"
