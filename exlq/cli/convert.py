"""`exlq convert`: a model, a text and a target in, a quantized model out."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exlq.cli.arguments.convert import AUTO
from exlq.cli.screen import Screen
from exlq.errors import ConfigError
from exlq.formats.gguf.overrides import read_type_file
from exlq.formats.gguf.recipes import recipe_named
from exlq.pipeline import job
from exlq.pipeline.config import ConvertConfig
from exlq.pipeline.estimate import estimate
from exlq.report import tables
from exlq.report.profile import profile_table
from exlq.sizes import parse_bytes
from exlq.sizing.advice import writable
from exlq.sizing.fitting import Room, default_context, largest_bits
from exlq.sizing.shapes import read_shape


def run(parsed: argparse.Namespace, screen: Screen) -> None:
    config = _config(parsed, screen)
    if parsed.dry_run:
        _rehearse(config, screen)
        return
    done = job.finished_summary(config)
    if done is not None:
        if config.clean:
            done = job.cleaned(config, done)
        screen.tell("This conversion is finished; -nr does it again.")
        _tell_profile(done if config.profile else {}, screen)
        screen.show(tables.summary_table(done), done)
        return
    started = job.begin(config, screen, shlex.join(sys.argv))
    expected = estimate(started.plan, started.outputs)
    notes = (*started.notes, *started.changes)
    screen.tell(tables.plan_table(started.plan, started.outputs, notes, expected))
    screen.expect(expected.stages_s)
    summary = job.run(started)
    if summary is None:
        made = str(config.output_measurement)
        found = started.plan.profile.found()
        told = {} if found is None else {"profile": found.as_json()}
        _tell_profile(told, screen)
        screen.show(f"measurement: {made}", {"measurement": made, **told})
    else:
        _tell_profile(summary, screen)
        screen.show(tables.summary_table(summary), summary)


def _tell_profile(told: Mapping[str, Any], screen: Screen) -> None:
    if "profile" in told:
        screen.tell(profile_table(told["profile"]))


def _rehearse(config: ConvertConfig, screen: Screen) -> None:
    formats, notes = job.rehearse(config)
    for figures in formats.values():
        if "types" in figures:
            sizes = figures["tensor_bytes"]
            rows = [(tensor, kind, sizes[tensor]) for tensor, kind in figures["types"].items()]
            screen.tell(tables.types_table(rows, figures["file_bytes"]))
    lines = [*(_foretold(name, figures) for name, figures in formats.items()), *notes]
    screen.show("\n".join(lines), {"outputs": formats, "notes": notes})


def _foretold(name: str, figures: Mapping[str, Any]) -> str:
    told = ""
    if figures["predicted_kl"] is not None:
        told = f", predicted KL divergence {figures['predicted_kl']:.5f} ± {figures['predicted_se']:.5f}"
    return f"{name}: {figures['bpw']:.4f} bits per weight{told}"


def _config(parsed: argparse.Namespace, screen: Screen) -> ConvertConfig:
    return ConvertConfig(
        in_dir=parsed.in_dir,
        out_dir=parsed.out_dir,
        calibration=parsed.cal_dataset,
        bits=_bits(parsed, screen),
        head_bits=parsed.head_bits,
        shard_mib=parsed.shard_size,
        rows=parsed.dataset_rows,
        length=parsed.length,
        measurement_rows=parsed.measurement_rows,
        measurement_length=parsed.measurement_length,
        effort=parsed.effort,
        measurement=parsed.measurement,
        output_measurement=parsed.output_measurement,
        compile_full=parsed.compile_full,
        no_resume=parsed.no_resume,
        clean=parsed.clean,
        allow_other_machine=parsed.allow_other_machine,
        force_measurement=parsed.force_measurement,
        formats=_names(parsed.format),
        measure=_names(parsed.measure),
        file_size=None if parsed.file_size is None else parse_bytes(parsed.file_size),
        gguf_type=None if parsed.gguf_type is None else recipe_named(parsed.gguf_type).name,
        gptq=not (parsed.no_gptq or parsed.unweighted),
        weighted=not parsed.unweighted,
        tensor_types=(*parsed.tensor_type, *_type_file(parsed.tensor_type_file)),
        output_tensor_type=parsed.output_tensor_type,
        token_embedding_type=parsed.token_embedding_type,
        split_bytes=None if parsed.split_size is None else parse_bytes(parsed.split_size),
        tokenizer_pre=parsed.tokenizer_pre,
        gguf_template=parsed.gguf_template,
        recipe=parsed.recipe,
        text_column=parsed.text_column,
        parse_special=parsed.parse_special,
        row_mode=parsed.rows,
        random_share=parsed.random_rows,
        states=parsed.states,
        seed=parsed.seed,
        threads=parsed.threads,
        device=parsed.device,
        workers=parsed.workers,
        objective=parsed.objective,
        permute_mlp=parsed.permute_mlp,
        profile=parsed.profile,
    )


def _bits(parsed: argparse.Namespace, screen: Screen) -> float | None:
    """The bits asked for, or with `auto` the most that run in the memory given."""
    if parsed.bits != AUTO:
        for flag, value in (("--memory", parsed.memory), ("--context", parsed.context)):
            if value is not None:
                raise ConfigError(f"{flag} {value}: it goes with -b auto alone")
        return None if parsed.bits is None else float(parsed.bits)
    if parsed.memory is None:
        raise ConfigError("-b auto wants --memory SIZE, as 16GiB: what the model is to run in")
    shape, asked = read_shape(parsed.in_dir), _names(parsed.format)
    formats = [name for name in writable(shape)[0] if asked is None or name in asked]
    if not formats:
        raise ConfigError(f"--format {parsed.format}: this model becomes {' and '.join(writable(shape)[0])}")
    context = default_context(shape) if parsed.context is None else parsed.context
    bits = largest_bits(shape, formats, Room(parse_bytes(parsed.memory), context), parsed.head_bits)
    screen.tell(
        f"-b auto: {bits:.2f} bits per weight run in {parsed.memory} with {context:,} tokens of context"
    )
    return bits


def _names(listed: str | None) -> tuple[str, ...] | None:
    return None if listed is None else tuple(name for name in listed.split(",") if name)


def _type_file(path: Path | None) -> list[str]:
    return [] if path is None else read_type_file(path)
