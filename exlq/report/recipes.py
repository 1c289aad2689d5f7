"""Tables of allocations for a terminal: targets compared, the frontier, reasons and differences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from exlq.recipes.explain import Change, Reason, Step, prices
from exlq.recipes.frontier import Point
from exlq.recipes.prediction import Prediction
from exlq.recipes.sheet import Options
from exlq.recipes.targets import Answer
from exlq.sizes import format_bytes

FEW_KINDS = 4  # of options that are listed by name


def answers_table(answers: Sequence[Answer]) -> Table:
    """One line for every target and format."""
    built = _table("Allocations", ("target", "format"), ("bpw", "bytes", "predicted KL"))
    built.add_column("options", overflow="fold")
    for answer in answers:
        built.add_row(
            target_words(answer),
            answer.sheet.format,
            f"{answer.bpw:.4f}",
            f"{answer.n_bytes:,}",
            kl_words(answer.predicted),
            _mix(answer.options),
        )
    return built


def target_words(answer: Answer) -> str:
    return " ".join(f"{flag} {value}" for flag, value in answer.target.items())


def split_words(answer: Answer) -> str:
    """What goes where, and the flag that puts it there."""
    assert answer.split is not None
    n, gpu, cpu = answer.split
    return (
        f"--n-gpu-layers {n}: {gpu:,} bytes ({format_bytes(gpu)}) on the GPU, {cpu:,} ({format_bytes(cpu)}) "
        f"on the CPU, predicted KL {kl_words(answer.predicted)}; KV cache and buffers come on top"
    )


def frontier_table(format: str, points: Sequence[Point], limit: int) -> Table:
    """Sizes from the smallest to the largest, evenly thinned to `limit` lines; 0 for all."""
    shown = _thinned(points, limit)
    title = f"{format}: every step of the frontier"
    if len(shown) < len(points):
        title = f"{format}: {len(shown)} of {len(points)} steps of the frontier (--limit 0 or --json for all)"
    built = _table(title, (), ("bpw", "bytes", "size", "predicted KL"))
    for point in shown:
        size = format_bytes(point.n_bytes)
        built.add_row(f"{point.bpw:.4f}", f"{point.n_bytes:,}", size, kl_words(point.predicted))
    return built


def reasons_table(answer: Answer, found: Sequence[Reason], shown: Sequence[Reason]) -> Table:
    """Why every matrix has its option.

    Args:
        found: all reasons, for the prices under the table.
        shown: those to be listed.
    """
    title = (
        f"{answer.sheet.format}: {answer.bpw:.4f} bits per weight, {format_bytes(answer.n_bytes)}, "
        f"predicted KL {kl_words(answer.predicted)}"
    )
    right = ("bits", "error", "loss", "up to", "KL/MiB", "down to", "KL/MiB")
    built = _table(title, ("tensor", "option"), right)
    built.box, built.padding = SIMPLE_HEAD, (0, 1, 0, 0)
    for reason in shown:
        built.add_row(
            name_words(reason.keys) + (" (given)" if reason.fixed else ""),
            reason.desc,
            f"{reason.bpw:.3f}",
            f"{reason.err:.1e}",
            f"{reason.loss:.1e}",
            *_step_words(reason.up),
            *_step_words(reason.down),
        )
    up, down = prices(list(found))
    lines = []
    if len(shown) < len(found):
        lines.append(f"{len(shown)} of {len(found)} tensors (--limit 0 or --json for all)")
    if up is not None and down is not None:
        pays = ", so no exchange of two steps pays" if up <= down else ""
        lines.append(
            f"a step up saves at most {up:.2e} of KL per MiB, one down costs at least {down:.2e}{pays}"
        )
    built.caption = "\n".join(lines)
    return built


def changes_table(
    title: str, before: Options, after: Options, changes: Sequence[Change], limit: int
) -> Table:
    """The matrices that differ, and the totals."""
    shown = changes[:limit] if limit else changes
    built = _table(title, ("tensor", "before", "after"), ("bits", "loss"))
    for change in shown:
        built.add_row(
            name_words((change.key,)),
            change.before.desc,
            change.after.desc,
            f"{change.after.total_bits - change.before.total_bits:+,}",
            f"{change.after.loss - change.before.loss:+.2e}",
        )
    built.add_section()
    bits = sum(o.total_bits for o in after.values()) - sum(o.total_bits for o in before.values())
    loss = sum(o.loss for o in after.values()) - sum(o.loss for o in before.values())
    more = f", {len(changes) - len(shown)} not shown" if len(shown) < len(changes) else ""
    summary = f"{len(changes)} of {len(before)} differ{more}"
    built.add_row(summary, "", "", f"{bits:+,}", f"{loss:+.2e}")
    return built


def kl_words(predicted: Prediction | None) -> str:
    return "unknown" if predicted is None else f"{predicted.kl:.5f} ± {predicted.se:.5f}"


def name_words(keys: Sequence[str]) -> str:
    """`0.q_proj` for `model.layers.0.self_attn.q_proj`; of several the first, of the others the last part."""
    first, *others = ([*filter(str.isdecimal, key.split(".")), key.rpartition(".")[2]] for key in keys)
    return ", ".join([".".join(first), *(parts[-1] for parts in others)])


def _table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    built = Table(title=title, title_justify="left", caption_justify="left")
    for heading in left:
        built.add_column(heading, overflow="fold")
    for heading in right:
        built.add_column(heading, justify="right", no_wrap=True)
    return built


def _mix(options: Options) -> str:
    """How many matrices have which option; of many kinds the least and the most bits alone."""
    counts = Counter(option.desc for option in options.values())
    if len(counts) > FEW_KINDS:
        sizes = sorted((option.bpw, option.desc) for option in options.values())
        return f"{len(counts)} kinds, {sizes[0][0]:.2f} to {sizes[-1][0]:.2f} bits"
    return ", ".join(f"{count} {desc}" for desc, count in sorted(counts.items()))


def _step_words(step: Step | None) -> tuple[str, str]:
    """A step's GGUF type, or its bits per weight, and what it makes per MiB."""
    if step is None:
        return "", ""
    to = step.desc if " " not in step.desc else f"{step.bpw:.3f}"
    return to, f"{step.kl_per_mib:.1e}"


def _thinned(points: Sequence[Point], limit: int) -> list[Point]:
    """Those nearest to evenly spaced sizes, the ends among them."""
    if not 1 < limit < len(points):
        return list(points)
    low, high = points[0].n_bytes, points[-1].n_bytes
    wanted = [low + (high - low) * i / (limit - 1) for i in range(limit)]
    kept = {min(range(len(points)), key=lambda i: abs(points[i].n_bytes - size)) for size in wanted}
    return [points[i] for i in sorted(kept)]
