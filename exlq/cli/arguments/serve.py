"""`exlq serve`: a GGUF file behind llama.cpp's HTTP server."""

from __future__ import annotations

import argparse

from exlq.cli.arguments.generation import arrange_model, arrange_runtime

SUMMARY = "Serve a GGUF file: OpenAI-compatible API and web page, by llama.cpp."
EXAMPLES = (
    "exlq serve model-Q4_K_M.gguf",
    "exlq serve OUT --host 0.0.0.0 --port 9000 --ctx-size 8192",
)


def arrange(parser: argparse.ArgumentParser) -> None:
    arrange_model(parser.add_argument_group("model"))
    address = parser.add_argument_group("address")
    address.add_argument(
        "--host", default="127.0.0.1", metavar="NAME", help="default 127.0.0.1, this machine"
    )
    address.add_argument(
        "--port", type=int, default=8080, metavar="N", help="default 8080; 0: one that is free"
    )
    arrange_runtime(parser.add_argument_group("machine"))
