"""The plain recipe of ExLlamaV2 0.3.2 as an opponent: its rounding, tied options, measure and annealing.

Every option of attention and MLP is tried on the unquantized model; its error is that of the residual
stream behind the module. The second pass rounds one module after the other on what the quantized ones
before give, all Hessians of a module being of its unquantized weights. The head has 6 bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from exlq.formats.exl2_config import exl2_config
from exlq.formats.exl2_directory import Exl2Writer
from exlq.formats.exl2_options import groups_of
from exlq.models.config import read_json
from exlq.pipeline import passes
from exlq.pipeline.plan import Plan
from exlq.types import Option
from exlq.workspace import Workspace
from scripts import exllamav2_rounding as rounding
from scripts.annealer import anneal
from scripts.exllamav2_measure import Way, forward, input_inverses, linears, measure_block, rounded, square
from scripts.exllamav2_options import HEAD, HEAD_BITS, MODULES

Stored = tuple[str, dict[str, Tensor]]


def measure(plan: Plan, workspace: Workspace) -> list[list[Way]]:
    """The ways of every module, attention and MLP of each block in turn."""
    model, rows = plan.model, plan.measurement_rows
    states = passes.embedded(model, rows.ids[~rows.heldout], workspace, torch.float32)
    found = [ways for index in range(model.n_blocks) for ways in measure_block(model, index, states)]
    workspace.remove("states")
    return found


def allocate(modules: Sequence[Sequence[Way]], budget: int, seed: int = 0) -> list[Way]:
    """One way per module, of at most `budget` bits in all."""
    figures = [[(float(way.bits), way.error) for way in ways] for ways in modules]
    return [ways[i] for ways, i in zip(modules, anneal(figures, budget, seed), strict=True)]


def convert(plan: Plan, chosen: Sequence[Way], directory: Path, workspace: Workspace) -> Path:
    """Writes the quantized model to `directory`, which exists, rounded on the plan's rows."""
    model = plan.model
    options = {key: option for way in chosen for key, option in way.options.items()}
    writer = Exl2Writer(directory, None)
    for name in model.plain_tensors():
        writer.add_plain(name, model.weights.read(name))
    for key, tensors in _quantized(plan, options, workspace):
        writer.add_linear(key, tensors, model.linear_bias(key))
    record = plan.rows.record
    config = exl2_config(
        read_json(plan.config.in_dir),
        bits=sum(way.bits for way in chosen) / plan.numel,
        head_bits=HEAD_BITS,
        rows=record.rows,
        length=record.row_length,
        dataset=record.file,
        version="0.3.2",
        architecture=model.family.exl2_architecture or model.family.architectures[0],
    )
    writer.close(config, plan.config.in_dir)
    return directory


def _quantized(plan: Plan, options: Mapping[str, Option], workspace: Workspace) -> Iterator[Stored]:
    """The second pass: the stored tensors of every linear, the head last."""
    model = plan.model
    states = passes.embedded(model, plan.rows.ids[~plan.rows.heldout], workspace, torch.float32)
    for index in range(model.n_blocks):
        with model.block(index) as block:
            for module in MODULES:
                inverses = input_inverses(block, states)
                for spec, stage in linears(model, index, module):
                    found = rounded(model, spec, options[spec.key], inverses[stage])
                    block.set_weight(spec.key, found.weight())
                    yield spec.key, _stored(found, options[spec.key])
            forward(block, states)
    total = torch.zeros(model.hidden_size, model.hidden_size, device=model.device)
    for rows in passes.batches(states):
        total += square(model.final_norm(states[rows]))
    head = rounded(model, model.head, HEAD, rounding.inverse(total / len(states)))
    yield model.head.key, _stored(head, HEAD)
    workspace.remove("states")


def _stored(found: rounding.Rounded, option: Option) -> dict[str, Tensor]:
    return found.tensors(groups_of(option.qparams, len(found.perm)))
