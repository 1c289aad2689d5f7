"""Tables of plans and results, for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table

from exlq.pipeline.config import ConvertConfig
from exlq.pipeline.estimate import Estimate
from exlq.pipeline.output import Output
from exlq.pipeline.plan import Plan
from exlq.report.eta import duration
from exlq.report.pairs import pairs
from exlq.sizes import format_bytes


def plan_table(plan: Plan, outputs: Sequence[Output], notes: Sequence[str], estimate: Estimate) -> Table:
    """What is about to be done and what it will take."""
    config, rows = plan.config, plan.rows
    measured = plan.measurement_rows
    lines = [
        ("model", f"{config.in_dir} ({plan.model.family.architectures[0]}, {plan.model.n_blocks} blocks)"),
        ("target", _target(config)),
        *((output.name, f"reachable {output.reach}") for output in outputs),
        (
            "calibration",
            f"{rows.record.file}, {rows.record.tokens:,} tokens in {rows.record.documents:,} texts",
        ),
        ("measured on", _rows(measured.ids.shape, int(measured.heldout.sum()))),
        ("quantized on", _rows(rows.ids.shape, int(rows.heldout.sum()))),
        ("arithmetic", f"{estimate.gemm_flops / 1e9:,.0f} GFLOP/s in matrix products on {plan.model.device}"),
        ("time, about", f"{duration(estimate.total_s)} ({duration(estimate.measuring_s)} measuring)"),
        ("memory, about", format_bytes(estimate.memory_bytes)),
        (
            "disk, about",
            f"{format_bytes(estimate.disk_bytes)}, of which the result {format_bytes(estimate.output_bytes)}",
        ),
    ]
    remarks = dict.fromkeys((*notes, *measured.record.notes, *rows.record.notes))
    return pairs("Plan", [*lines, *(("note", remark) for remark in remarks)])


def _target(config: ConvertConfig) -> str:
    if not config.targets:
        return "measurement only"
    named = {
        "-b": f"{config.bits} bits per weight, head {config.head_bits} bits",
        "--file-size": f"at most {format_bytes(config.file_size or 0)}",
        "--gguf-type": f"{config.gguf_type}",
        "--recipe": f"{config.recipe}",
    }
    return named[next(iter(config.targets))]


def summary_table(summary: Mapping[str, Any]) -> Table:
    """The outcome of a conversion, from `summary.json`."""
    evaluated = next(iter(summary["outputs"].values()))["evaluation"]
    lines = [line for name, made in summary["outputs"].items() for line in _output_lines(name, made, summary)]
    lines += [
        (
            "compared on",
            f"{evaluated['n_tokens']:,} tokens of {summary['calibration']['file']}, "
            f"{summary['evaluated_on']}",
        ),
        ("base", f"{format_bytes(summary['base_bytes'])}, perplexity {evaluated['perplexity_base']:.4f}"),
        ("peak memory", format_bytes(summary["peak_anonymous_bytes"])),
        ("time", ", ".join(f"{name} {duration(s)}" for name, s in summary["seconds"].items())),
    ]
    if machine := summary.get("machine"):
        lines.append(("machine", f"{machine['threads']} threads, {machine.get('device', 'cpu')}"))
    if summary["measurement"]:
        lines.append(("measurement", summary["measurement"]))
    if kept := summary.get("kept_bytes"):
        lines.append(("kept for another run", f"{format_bytes(kept)} in work; --clean removes them"))
    return pairs("Result", [*lines, *(("note", note) for note in summary["notes"])])


def _output_lines(name: str, made: Mapping[str, Any], summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What became of one format."""
    found, asked = made["evaluation"], summary["target"].get("-b")
    size = format_bytes(made["bytes"])
    if "file_bpw" in made:
        size += f", {made['file_bpw']:.3f} bits per weight with embedding and head"
    predicted = "not measured"
    if made["predicted_kl"] is not None:
        predicted = f"{made['predicted_kl']:.5f} ± {made['predicted_se']:.5f}"
    lines = [
        (f"{name}: bits per weight", f"{made['bpw']:.4f}" + (f" (asked {asked:g})" if asked else "")),
        ("size", size),
        ("perplexity", f"{found['perplexity']:.4f}"),
        ("KL divergence", f"{found['kl_mean']:.5f} ± {found['kl_se']:.5f} nats per token (base 0)"),
        ("predicted", predicted),
        ("same best token", f"{100 * found['top1_agreement']:.2f} %"),
    ]
    if made["optimality_gap"] is not None:
        lines.append(("optimality gap", f"{100 * made['optimality_gap']:.4f} %"))
    lines += [("file", path) for path in made["paths"]]
    return [*lines, *(("note", note) for note in made["notes"])]


def types_table(rows: Iterable[tuple[str, str, int]], total: int) -> Table:
    """Every tensor's name, type and bytes, and the bytes of the file."""
    built = Table(title="Tensors", title_justify="left")
    for heading, justify in (("tensor", "left"), ("type", "left"), ("bytes", "right")):
        built.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for name, kind, n_bytes in rows:
        built.add_row(name, kind, f"{n_bytes:,}")
    built.add_section()
    built.add_row("the file with its metadata", "", f"{total:,}")
    return built


def _rows(shape: tuple[int, ...], heldout: int) -> str:
    return f"{shape[0]} rows of {shape[1]} tokens, {heldout} of them held out"
