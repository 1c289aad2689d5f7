"""`exlq run`: text continued by a model."""

from __future__ import annotations

import argparse

from exlq.cli.arguments.generation import arrange_device, arrange_model, arrange_runtime, arrange_sampling

SUMMARY = "Let a model go on from a text: EXL2, GGUF or Hugging Face."
EXAMPLES = (
    'exlq run OUT -p "I have a dream"',
    'exlq run model-Q4_K_M.gguf -p "I have a dream" -n 100 --temperature 0',
    "exlq run OUT/exl2 --device cuda --seed 7 < prompt.txt",
)


def arrange(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model and prompt")
    arrange_model(model)
    model.add_argument("-p", "--prompt", metavar="TEXT", help="the text to go on from; default stdin")
    arrange_sampling(parser.add_argument_group("answer"))
    machine = parser.add_argument_group("machine")
    arrange_runtime(machine)
    arrange_device(machine)
