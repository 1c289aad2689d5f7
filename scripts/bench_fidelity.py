"""KL divergence of our GGUF files beside stock llama.cpp's of the same size.

    python scripts/bench_fidelity.py --model MODEL --calibration valid.parquet --evaluation test.parquet

Stock: the recipe's types (llama-quantize's rules), every tensor rounded by ggml_quantize_chunk with an
importance matrix of the very tokens that ours is calibrated on, as llama-imatrix collects it: none for
embedding and head. Ours: `exlq convert --file-size` with the bytes of the stock file. Both are run in
llama.cpp against the F32 file: dequantized to F32 (the weights), and as they are (with llama.cpp's
rounding of activations). Without --evaluation, the rows held out of the calibration are scored.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from exlq.calibration import evaluation_chunks, load_tokenizer
from exlq.evaluate.divergence import Divergence, against
from exlq.evaluate.llamacpp import quantize_chunk
from exlq.evaluate.predictor import InLlamaCpp, Predictor
from exlq.formats.gguf.reader import GgufFile
from exlq.formats.gguf.recipes import recipe_named, recipe_types
from exlq.formats.gguf.values import TensorInfo
from exlq.formats.gguf.writer import GgufWriter
from exlq.formats.gguf_blocks import TYPES
from exlq.pipeline import job
from exlq.pipeline.config import ConvertConfig
from exlq.pipeline.gguf_description import described
from exlq.pipeline.imatrix import importance_matrix
from exlq.pipeline.plan import Plan, make_plan
from exlq.pipeline.progress import silent
from exlq.workspace import Workspace

NOT_COLLECTED = ("token_embd.weight", "output.weight")  # by llama-imatrix, unless asked


@dataclass(frozen=True)
class Row:
    """One recipe: bytes, and the divergence of the weights and of the file as it is, stock's and ours."""

    recipe: str
    stock_bytes: int
    our_bytes: int
    stock: tuple[Divergence, Divergence]
    ours: tuple[Divergence, Divergence]

    def __str__(self) -> str:
        weights, files = (
            (s.kl_mean, o.kl_mean, o.kl_mean / s.kl_mean) for s, o in zip(self.stock, self.ours, strict=True)
        )
        return (
            f"| {self.recipe} | {self.stock_bytes:,} | {self.our_bytes:,} "
            f"| {weights[0]:.5f} | {weights[1]:.5f} | {weights[2]:.2f} "
            f"| {files[0]:.5f} | {files[1]:.5f} | {files[2]:.2f} |"
        )


def main() -> None:
    given = _arguments()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory(prefix="exlq-fidelity-") as directory:
        scratch = Path(directory)
        config = ConvertConfig(
            in_dir=given.model,
            out_dir=scratch / "base",
            calibration=given.calibration,
            formats=("gguf",),
            measure=("gguf",),
            gguf_type="F32",
        )
        base = converted(config)
        plan = make_plan(config)
        chunks = evaluated_chunks(plan, given.evaluation, given.chunks)
        importance = collected(plan, scratch)
        measurement = scratch / "measurement.json"
        measuring = replace(config, gguf_type=None, output_measurement=measurement, out_dir=scratch / "m")
        job.run(job.begin(measuring, silent, ""))
        print(_heading(plan, chunks, given.evaluation))
        with against(InLlamaCpp(base, given.threads), chunks) as compared:
            for name in given.recipes.split(","):
                stock = stock_file(base, scratch / f"stock-{name}.gguf", name, plan, importance)
                target = replace(
                    config,
                    gguf_type=None,
                    file_size=stock.stat().st_size,
                    measurement=measurement,
                    out_dir=scratch / name,
                )
                ours = converted(target)
                pairs = [divergences(compared, path, scratch, given.threads) for path in (stock, ours)]
                print(Row(name, stock.stat().st_size, ours.stat().st_size, *pairs), flush=True)


def converted(config: ConvertConfig) -> Path:
    """The one GGUF file of a conversion."""
    summary = job.run(job.begin(config, silent, ""))
    assert summary is not None
    return next(Path(path) for path in summary["outputs"]["gguf"]["paths"] if path.endswith(".gguf"))


def collected(plan: Plan, scratch: Path) -> Mapping[str, Tensor]:
    """(in_features,) importance by tensor, of those llama-imatrix collects."""
    ids = plan.rows.ids[~plan.rows.heldout]
    entries = described(plan).entries
    found = importance_matrix(plan.model, entries, ids, "", Workspace(scratch), silent)
    return {
        name: importance
        for name in found.entries
        if name not in NOT_COLLECTED and (importance := found.importance(name)) is not None
    }


def stock_file(base: Path, path: Path, recipe: str, plan: Plan, importance: Mapping[str, Tensor]) -> Path:
    """What llama-quantize makes of the base file with that importance matrix."""
    with GgufFile(base) as file:
        types = recipe_types(
            recipe_named(recipe), list(file.tensors.values()), described(plan).shape, imatrix=True
        )
        infos = [TensorInfo(name, info.shape, types[name]) for name, info in file.tensors.items()]
        metadata = [entry for entry in file.metadata.values() if not entry.key.startswith("exlq.")]
        writer = GgufWriter(path, metadata, infos)
        for info in infos:
            data = file.read(info.name)
            if info.type != "F32":
                weight = TYPES["F32"].unpack(data)
                data = quantize_chunk(info.type, weight, importance.get(info.name))
            writer.add(info.name, data)
        writer.close()
    return path


def divergences(
    compared: Callable[[Predictor], Divergence], path: Path, scratch: Path, threads: int
) -> tuple[Divergence, Divergence]:
    """Of the dequantized weights, and of the file as llama.cpp runs it."""
    weights = scratch / "weights.gguf"
    found = (
        compared(InLlamaCpp(path, threads, copy=weights)),
        compared(InLlamaCpp(path, threads)),
    )
    weights.unlink()
    return found


def evaluated_chunks(plan: Plan, evaluation: Path | None, most: int | None) -> Tensor:
    """(n, length) int64 token rows to score."""
    if evaluation is None:
        return plan.checked_rows()[0][:most]
    length = min(512, plan.model.max_length)
    return evaluation_chunks(evaluation, load_tokenizer(plan.config.in_dir), length, most, None)


def _heading(plan: Plan, chunks: Tensor, evaluation: Path | None) -> str:
    text = evaluation.name if evaluation else f"held-out rows of {plan.rows.record.file}"
    return (
        f"{plan.config.in_dir.name}, calibrated on {plan.rows.record.file}, KL divergence on {text} "
        f"({len(chunks)} chunks of {chunks.shape[1]})\n\n"
        "| recipe | stock, bytes | ours, bytes | stock, weights | ours, weights | ratio "
        "| stock, file | ours, file | ratio |\n|---|--:|--:|--:|--:|--:|--:|--:|--:|"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="DIR")
    add("--calibration", type=Path, metavar="FILE", help="parquet file of text; default: bundled")
    add("--evaluation", type=Path, metavar="FILE", help="parquet file of text; default: held-out rows")
    add("--recipes", default="Q4_K_M,Q3_K_M,Q2_K", metavar="LIST")
    add("--chunks", type=int, metavar="N", help="chunks scored at most; default all")
    add("--threads", type=int, default=1, metavar="N")
    return parser.parse_args()


if __name__ == "__main__":
    main()
