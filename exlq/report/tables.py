"""Tables of plans, results and evaluations, for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from exlq.evaluate.divergence import Divergence
from exlq.pipeline.estimate import Estimate
from exlq.pipeline.plan import Plan, reachable_bits


def table(title: str, rows: Iterable[tuple[str, str]]) -> Table:
    """Two columns: what, and its value."""
    built = Table(title=title, show_header=False, title_justify="left")
    built.add_column(style="bold")
    built.add_column(overflow="fold")
    for name, value in rows:
        built.add_row(name, value)
    return built


def plan_table(plan: Plan, estimate: Estimate) -> Table:
    """What is about to be done and what it will take."""
    low, high = (bits / plan.numel for bits in reachable_bits(plan))
    config, rows = plan.config, plan.rows
    target = "measurement only" if config.bits is None else f"{config.bits:g} bits per weight"
    measured = plan.measurement_rows
    lines = [
        ("model", f"{config.in_dir} ({plan.model.family.architectures[0]}, {plan.model.n_blocks} blocks)"),
        ("target", f"{target}, head {config.head_bits} bits; reachable {low:.3f} to {high:.3f}"),
        (
            "calibration",
            f"{rows.record.file}, {rows.record.tokens:,} tokens in {rows.record.documents:,} texts",
        ),
        ("measured on", _rows(measured.ids.shape, int(measured.heldout.sum()))),
        ("quantized on", _rows(rows.ids.shape, int(rows.heldout.sum()))),
        ("arithmetic", f"{estimate.gemm_flops / 1e9:,.0f} GFLOP/s in matrix products on {plan.model.device}"),
        ("time, about", f"{_duration(estimate.total_s)} ({_duration(estimate.measuring_s)} measuring)"),
        ("memory, about", _size(estimate.memory_bytes)),
        ("disk, about", f"{_size(estimate.disk_bytes)}, of which the result {_size(estimate.output_bytes)}"),
    ]
    lines += [("note", note) for note in dict.fromkeys((*measured.record.notes, *rows.record.notes))]
    return table("Plan", lines)


def summary_table(summary: Mapping[str, Any]) -> Table:
    """The outcome of a conversion, from `summary.json`."""
    result, output = summary["result"], summary["output"]
    found = result["evaluation"]
    return table(
        "Result",
        [
            ("bits per weight", f"{result['bpw']:.4f} (asked {summary['target']['bits']:g})"),
            ("optimality gap", f"{100 * result['optimality_gap']:.4f} %"),
            ("size", f"{_size(output['bytes'])} (base {_size(output['base_bytes'])})"),
            ("perplexity", f"{found['perplexity']:.4f} (base {found['perplexity_base']:.4f})"),
            ("KL divergence", f"{found['kl_mean']:.5f} ± {found['kl_se']:.5f} nats per token (base 0)"),
            ("predicted", f"{result['predicted_kl']:.5f}"),
            ("same best token", f"{100 * found['top1_agreement']:.2f} %"),
            (
                "compared on",
                f"{found['n_tokens']:,} tokens of {summary['calibration']['file']}, {result['evaluated_on']}",
            ),
            ("model", output["directory"]),
            ("measurement", output["measurement"]),
            ("peak memory", _size(summary["peak_anonymous_bytes"])),
            ("time", ", ".join(f"{name} {_duration(s)}" for name, s in summary["seconds"].items())),
        ],
    )


def evaluation_table(name: str, found: Divergence, text: Path) -> Table:
    """Figures of one model against its base, and the protocol they were taken by."""
    return table(
        f"{name} on {text.name}",
        [
            ("perplexity", f"{found.perplexity:.4f}"),
            ("perplexity of the base", f"{found.perplexity_base:.4f}"),
            ("KL divergence, mean", f"{found.kl_mean:.6f} ± {found.kl_se:.6f}"),
            ("KL divergence, median", f"{found.kl_median:.6f}"),
            ("KL divergence, 99 %", f"{found.kl_p99:.6f}"),
            ("same best token", f"{100 * found.top1_agreement:.3f} %"),
            ("noise floor of the KL", f"{found.noise_floor:.1e}"),
            ("protocol", protocol(found)),
        ],
    )


def protocol(found: Divergence) -> str:
    """How an evaluation was made, in words."""
    return (
        f"{found.n_chunks} chunks of {found.context} tokens, each alone and opened by BOS where the "
        f"tokenizer adds one, second half scored ({found.n_tokens:,} tokens), float32, as llama-perplexity"
    )


def _rows(shape: tuple[int, ...], heldout: int) -> str:
    return f"{shape[0]} rows of {shape[1]} tokens, {heldout} of them held out"


def _size(n_bytes: float) -> str:
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if n_bytes >= scale:
            return f"{n_bytes / scale:.2f} {unit}"
    return f"{n_bytes / 1024:.1f} KiB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
