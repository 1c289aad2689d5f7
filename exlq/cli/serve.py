"""`exlq serve`: a GGUF file behind llama.cpp's HTTP server."""

from __future__ import annotations

import argparse
import os
import sys
import threading

from exlq.cli.generation import machine_of
from exlq.cli.screen import Screen
from exlq.errors import ConfigError
from exlq.run.llamacpp_server import has_web_page, serve
from exlq.run.source import find_source


def run(parsed: argparse.Namespace, screen: Screen) -> None:
    source = find_source(parsed.model, parsed.format)
    if source.kind != "gguf":
        raise ConfigError(
            f"{source.path}: serve takes GGUF files; for a job's directory add --format gguf, and EXL2 is "
            "served by TabbyAPI or text-generation-webui"
        )
    opened = serve(source.path, machine_of(parsed), parsed.host, parsed.port)
    address = opened.server.listening_address
    page = address if has_web_page(address) else None
    lines = (
        f"{source.path}: {opened.about}, context {opened.context} tokens",
        f"web page: {page or 'none in this build of xllamacpp'}",
        f"OpenAI-compatible API: {address}/v1",
        "Ctrl-C ends it.",
    )
    screen.show("\n".join(lines), {"address": address, "api": f"{address}/v1", "web_page": page})
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        screen.tell("stopped")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # xllamacpp's own end now and then waits for ever; nothing of the server is to be kept
