"""`exlq chat`: a conversation with a model."""

from __future__ import annotations

import argparse

from exlq.cli.arguments.generation import arrange_device, arrange_model, arrange_runtime, arrange_sampling

SUMMARY = "Talk to a model in the terminal, by its chat template."
EXAMPLES = (
    "exlq chat OUT",
    'exlq chat model-Q4_K_M.gguf --system "Answer in one sentence." --ctx-size 8192',
    "exlq chat OUT/exl2 --device cuda",
)


def arrange(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model and system text")
    arrange_model(model)
    model.add_argument("--system", default="", metavar="TEXT", help="what the model is told beforehand")
    arrange_sampling(parser.add_argument_group("answer"))
    machine = parser.add_argument_group("machine")
    arrange_runtime(machine)
    arrange_device(machine)
