"""`exlq serve`: llama.cpp's server answers over HTTP, and Ctrl-C ends it."""

from __future__ import annotations

import gzip
import json
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from exlq.cli import main
from tests.run.conftest import llama_cpp, plain_gguf

__all__ = ["llama_cpp", "plain_gguf"]
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def got(url: str, body: dict[str, Any] | None = None) -> bytes:
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", "Accept-Encoding": "gzip"}
    with OPENER.open(urllib.request.Request(url, data, headers), timeout=60) as response:
        raw: bytes = response.read()
        return gzip.decompress(raw) if response.headers.get("Content-Encoding") == "gzip" else raw


def test_it_answers_over_http_until_ctrl_c(llama_cpp: None, plain_gguf: Path) -> None:
    command = [sys.executable, "-m", "exlq", "serve", str(plain_gguf), "--port", "0", "--threads", "1"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([*command, "--status-json"], text=True, **pipes) as process:  # type: ignore[call-overload]
        try:
            told = json.loads(process.stdout.readline())
            address = told["address"]
            assert told["api"] == f"{address}/v1"
            assert json.loads(got(f"{address}/health")) == {"status": "ok"}
            models = json.loads(got(f"{told['api']}/models"))["data"]
            assert [model["id"] for model in models] == ["plain"]
            body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 5}
            reply = json.loads(got(f"{told['api']}/chat/completions", body))
            assert reply["usage"]["completion_tokens"] == 5
            if told["web_page"]:
                assert b"<!doctype html>" in got(f"{told['web_page']}/")
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, err) == (0, "")
    assert json.loads(out)["text"] == "stopped"


def test_what_cannot_be_served_is_one_line(
    llama_cpp: None, plain_gguf: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for arguments, why in (
            ([str(plain_gguf), "--port", port], f"port {port} cannot be listened on"),
            ([str(plain_gguf), "--port", "70000"], "--port 70000"),
            ([str(plain_gguf), "--host", "192.0.2.1", "--port", "0"], "192.0.2.1"),
            ([str(tiny_llama)], "serve takes GGUF files"),
        ):
            assert main(["serve", *arguments]) == 2
            shown = capsys.readouterr().err
            assert why in shown
            assert len(shown.splitlines()) == 1
