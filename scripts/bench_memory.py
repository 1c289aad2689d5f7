"""Peak anonymous memory of a 1.1-billion-parameter Llama shape through its first blocks.

Usage: python scripts/bench_memory.py [--blocks 2] [--rows 8] [--length 2048] [--threads 2]

Random weights of 22 blocks (2048 wide, 5632 inside, 32 heads of which 4 for keys, 32,000 tokens) are
written to a temporary directory (2.2 GB), then the passes of a conversion are run on them: gradients
through all blocks on 1024 tokens, measurement and quantization of the first blocks.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from exlq.formats.exl2_codec import Exl2Codec
from exlq.measurement import Measurement
from exlq.memory import PeakMemory
from exlq.pipeline import measure, quantize, sensitivity
from exlq.pipeline.config import ConvertConfig
from exlq.pipeline.plan import Plan, make_plan
from exlq.pipeline.progress import silent
from exlq.pipeline.state import machine
from exlq.workspace import Workspace

CODEC = Exl2Codec()
HIDDEN, INNER, BLOCKS, HEADS, KEY_HEADS, VOCABULARY = 2048, 5632, 22, 32, 4, 32000
BOUND_BYTES = 2_500_000_000


class Enough(Exception):  # noqa: N818
    """Raised when as many blocks as asked for are done."""


def main() -> int:
    """Prints the peak of every pass; exit code 1 if one is above 2.5 GB."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory(prefix="exlq-bench-") as scratch:
        model_dir, work = Path(scratch, "model"), Path(scratch, "work")
        work.mkdir()
        write_model(model_dir)
        config = ConvertConfig(
            in_dir=model_dir,
            out_dir=Path(scratch, "out"),
            bits=4.0,
            rows=arguments.rows,
            measurement_rows=arguments.rows,
            length=arguments.length,
            measurement_length=arguments.length,
        )
        peak = run(make_plan(config), arguments.blocks, Workspace(work))
    print(f"highest of all: {peak / 1e9:.2f} GB of anonymous memory (bound {BOUND_BYTES / 1e9} GB)")
    return int(peak > BOUND_BYTES)


def run(plan: Plan, blocks: int, workspace: Workspace) -> int:
    """All passes on the first `blocks`; the highest peak in bytes."""
    peaks: list[int] = []
    with timed("gradients, all blocks, 1024 tokens") as watched:
        rows = plan.measurement_rows.ids[:2, :512]
        fisher = sensitivity.fisher(
            plan.model, rows, workspace, 0, workspace.directory / "s.safetensors", silent
        )
    peaks.append(watched.memory.bytes)
    stop = StopAfter(blocks)
    with timed(f"measuring {blocks} blocks") as watched:
        empty = Measurement(**plan.origin, extra={"made_with": machine()})
        run_until_enough(lambda: measure.measure(plan, fisher, empty, workspace, lambda _: None, stop))
    peaks.append(watched.memory.bytes)
    options = {spec.key: CODEC.options(spec)[13] for spec in plan.linears}
    options[plan.model.head.key] = CODEC.head_option(plan.model.head, 6)
    with timed(f"quantizing {blocks} blocks") as watched:
        rounding = quantize.Rounding(plan, CODEC, options, fisher)
        passes = quantize.quantized_linears(rounding, workspace, StopAfter(blocks))
        run_until_enough(lambda: [spec for spec, _ in passes])
    peaks.append(watched.memory.bytes)
    return max(peaks)


def write_model(directory: Path) -> None:
    """config.json, a one-letter tokenizer and one shard per block, random in bf16."""
    directory.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }
    (directory / "config.json").write_text(json.dumps(config))
    write_tokenizer(directory)
    index: dict[str, str] = {}
    ends = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "lm_head.weight": (VOCABULARY, HIDDEN)}
    write_shard(directory, "ends.safetensors", ends | {"model.norm.weight": (HIDDEN,)}, index)
    for block in range(BLOCKS):
        write_shard(directory, f"block-{block}.safetensors", block_shapes(f"model.layers.{block}"), index)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def block_shapes(prefix: str) -> dict[str, tuple[int, ...]]:
    """Shapes of one block's tensors."""
    keys = HIDDEN * KEY_HEADS // HEADS
    return {
        f"{prefix}.input_layernorm.weight": (HIDDEN,),
        f"{prefix}.post_attention_layernorm.weight": (HIDDEN,),
        f"{prefix}.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
        f"{prefix}.self_attn.k_proj.weight": (keys, HIDDEN),
        f"{prefix}.self_attn.v_proj.weight": (keys, HIDDEN),
        f"{prefix}.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        f"{prefix}.mlp.gate_proj.weight": (INNER, HIDDEN),
        f"{prefix}.mlp.up_proj.weight": (INNER, HIDDEN),
        f"{prefix}.mlp.down_proj.weight": (HIDDEN, INNER),
    }


def write_shard(
    directory: Path, name: str, shapes: dict[str, tuple[int, ...]], index: dict[str, str]
) -> None:
    generator = torch.Generator().manual_seed(len(index))
    tensors = {
        key: (
            torch.ones(shape)
            if len(shape) == 1
            else torch.randn(shape, generator=generator) * shape[1] ** -0.5
        ).bfloat16()
        for key, shape in shapes.items()
    }
    save_file(tensors, directory / name)
    index.update(dict.fromkeys(tensors, name))


def write_tokenizer(directory: Path) -> None:
    """Every byte a token: enough to make rows of the bundled calibration text."""
    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


class StopAfter:
    """A listener that stops a pass after so many blocks."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks

    def __call__(self, stage: str, done: int, total: int) -> None:
        if done >= self.blocks:
            raise Enough


def run_until_enough(work: object) -> None:
    """Calls `work` and takes its `Enough` for an end."""
    assert callable(work)
    try:
        work()
    except Enough:
        return


class timed:  # noqa: N801
    """Watches time and memory inside a `with`, and prints both."""

    def __init__(self, label: str) -> None:
        self.label, self.memory = label, PeakMemory()

    def __enter__(self) -> timed:
        self.memory.__enter__()
        self.begin = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self.memory.__exit__()
        seconds = time.perf_counter() - self.begin
        print(f"{self.label:>36}: {seconds:7.1f} s, peak {self.memory.bytes / 1e9:.2f} GB", flush=True)


if __name__ == "__main__":
    sys.exit(main())
