"""llama.cpp's server in this process, of the package xllamacpp, opened with checked settings."""

from __future__ import annotations

import socket
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exlq.errors import ConfigError, ModelError
from exlq.evaluation.llamacpp_api import shared_library
from exlq.run.engine import Machine
from exlq.run.source import GgufFacts, gguf_facts
from exlq.sizes import format_bytes

QUIET, LOG = -1, 3  # llama.cpp's verbosity: nothing, what it says by itself
STATUS = Path("/proc/self/status")
WAIT_S = 10


@dataclass(frozen=True)
class Opened:
    """A running server; `settings` are xllamacpp's, its `server` ends when it is no longer referred to."""

    server: Any
    facts: GgufFacts
    context: int
    about: str


def open_server(path: Path, machine: Machine, **settings: Any) -> Opened:
    """Loads a GGUF file, of a split one given the first shard, and listens on a port.

    Args:
        settings: attributes of xllamacpp's CommonParams, beside those that follow from `machine`.

    Raises:
        ConfigError: where llama.cpp is not installed, or for a flag that it cannot honour here.
        ModelError: if it cannot load the file.
    """
    if shared_library() is None:
        raise ConfigError(
            "llama.cpp, which runs GGUF files, is not installed; pip install 'exlq[eval]' (Linux on x86-64)"
        )
    machine.refuse("llama.cpp", ("--device", "--dtype"), "for GGUF files there is --n-gpu-layers")
    facts = gguf_facts(path)
    context = machine.context(facts.context_length)
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.verbosity = context, LOG if machine.verbose else QUIET
    params.load_mode = _load_mode(xllamacpp.llama_load_mode, machine)
    _use_gpu(params, machine, xllamacpp)
    if machine.threads is not None:
        params.cpuparams.n_threads = machine.threads
    params.endpoint_metrics = True
    for name, value in settings.items():
        setattr(params, name, value)
    locked = _locked_bytes()
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as exc:
        raise ModelError(f"{path}: llama.cpp cannot load it; -v shows what it says") from exc
    server.handle_metrics()  # returns once the server works; ended before that, it would wait for ever
    if machine.mlock:
        _check_locked(_locked_bytes() - locked, facts.n_bytes)
    return Opened(server, facts, context, f"GGUF, in llama.cpp of xllamacpp {xllamacpp.__version__}")


def serve(path: Path, machine: Machine, host: str, port: int) -> Opened:
    """Serves a file over HTTP until the result is given up: an OpenAI-compatible API and a web page.

    Args:
        port: 0 for one that is free.

    Raises:
        ConfigError: for an address that cannot be listened on, else as `open_server`.
    """
    _check_address(host, port)
    return open_server(path, machine, hostnames=[host], port=port, model_alias={path.stem})


def has_web_page(address: str) -> bool:
    """Whether the server at an address carries llama.cpp's web page; not every build does."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(f"{address}/", headers={"Accept-Encoding": "gzip"})
    try:
        with opener.open(request, timeout=WAIT_S) as response:
            return bool("html" in (response.headers.get("Content-Type") or ""))
    except (urllib.error.URLError, OSError):
        return False


def _check_address(host: str, port: int) -> None:
    if not 0 <= port <= 65535:
        raise ConfigError(f"--port {port}: 0 to 65535 is wanted")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(address)
            tried.listen()
    except OSError as exc:
        reason = (exc.strerror or str(exc)).lower()
        raise ConfigError(
            f"{host}, port {port} cannot be listened on ({reason}); give another --port or --host"
        ) from exc


def _load_mode(modes: Any, machine: Machine) -> Any:
    """llama.cpp maps the file into memory, unless told not to, and locks it there, where told to."""
    named = {
        (False, False): modes.LLAMA_LOAD_MODE_AUTO,
        (True, False): modes.LLAMA_LOAD_MODE_NONE,
        (False, True): modes.LLAMA_LOAD_MODE_MMAP_MLOCK,
        (True, True): modes.LLAMA_LOAD_MODE_MLOCK,
    }
    return named[machine.no_mmap, machine.mlock]


def _use_gpu(params: Any, machine: Machine, xllamacpp: Any) -> None:
    if machine.n_gpu_layers is None:
        return
    cpu = xllamacpp.ggml_backend_dev_type.GGML_BACKEND_DEVICE_TYPE_CPU
    if machine.n_gpu_layers and all(device["type"] == cpu for device in xllamacpp.get_device_info()):
        raise ConfigError(
            f"--n-gpu-layers {machine.n_gpu_layers}: this xllamacpp sees no GPU; install its build for yours"
        )
    params.n_gpu_layers = machine.n_gpu_layers


def _locked_bytes() -> int:
    """VmLck of this process; 0 where the system does not tell."""
    lines = STATUS.read_text(encoding="utf-8").splitlines() if STATUS.exists() else []
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmLck"))


def _check_locked(locked: int, n_bytes: int) -> None:
    """llama.cpp goes on where the system refuses to lock memory; the flag would be ignored silently."""
    if locked < n_bytes // 2:
        raise ConfigError(
            f"--mlock: the system let {format_bytes(locked)} of {format_bytes(n_bytes)} be locked in memory; "
            "raise `ulimit -l` or leave it out"
        )
