"""The C functions of llama.cpp this package calls, found in the library that comes with xllamacpp."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Mapping
from ctypes import (
    POINTER,
    Structure,
    c_bool,
    c_char_p,
    c_float,
    c_int8,
    c_int32,
    c_int64,
    c_size_t,
    c_uint8,
    c_uint32,
    c_void_p,
)
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exlq.errors import ConfigError

PACKAGE = "xllamacpp"
ERROR_LEVEL = 4  # ggml_log_level
CONTINUED_LEVEL = 5
TYPE_F32 = 0  # ggml_type
FLASH_ATTENTION_OFF = 0  # llama_flash_attn_type; -1 lets llama.cpp choose
ROOM_BYTES = 1024  # behind a parameter struct: a newer, longer one must not overrun ours

FLOATS = POINTER(c_float)
TOKENS = POINTER(c_int32)
LOG = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)


class ModelParams(Structure):
    """`llama_model_params`, llama.h of release b11222 and after."""

    _fields_ = (
        ("devices", c_void_p),
        ("tensor_buft_overrides", c_void_p),
        ("n_gpu_layers", c_int32),
        ("split_mode", c_int32),
        ("load_mode", c_int32),
        ("lazy_mode", c_int32),
        ("main_gpu", c_int32),
        ("tensor_split", c_void_p),
        ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
        ("kv_overrides", c_void_p),
        ("vocab_only", c_bool),
        ("check_tensors", c_bool),
        ("use_extra_bufts", c_bool),
        ("no_host", c_bool),
        ("no_alloc", c_bool),
        ("load_mtp", c_bool),
        ("room", c_uint8 * ROOM_BYTES),
    )


class ContextParams(Structure):
    """`llama_context_params`, of the same header and with what xllamacpp 2026.10 has added to it."""

    _fields_ = (
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32),
        ("n_rs_seq", c_uint32),
        ("n_outputs_max", c_uint32),
        ("n_outputs_max_per_seq", c_uint32),
        ("n_threads", c_int32),
        ("n_threads_batch", c_int32),
        ("ctx_type", c_int32),
        ("rope_scaling_type", c_int32),
        ("pooling_type", c_int32),
        ("attention_type", c_int32),
        ("flash_attn_type", c_int32),
        ("rope_freq_base", c_float),
        ("rope_freq_scale", c_float),
        ("yarn_ext_factor", c_float),
        ("yarn_attn_factor", c_float),
        ("yarn_beta_fast", c_float),
        ("yarn_beta_slow", c_float),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("cb_eval", c_void_p),
        ("cb_eval_user_data", c_void_p),
        ("type_k", c_int32),
        ("type_v", c_int32),
        ("abort_callback", c_void_p),
        ("abort_callback_data", c_void_p),
        ("unnamed", c_void_p),  # 8 bytes of this release that the header above lacks
        ("embeddings", c_bool),
        ("offload_kqv", c_bool),
        ("no_perf", c_bool),
        ("op_offload", c_bool),
        ("swa_full", c_bool),
        ("kv_unified", c_bool),
        ("samplers", c_void_p),
        ("n_samplers", c_size_t),
        ("ctx_other", c_void_p),
        ("room", c_uint8 * ROOM_BYTES),
    )


class Batch(Structure):
    """`llama_batch`; where `pos`, `n_seq_id` and `seq_id` are null, one sequence from position 0 is meant."""

    _fields_ = (
        ("n_tokens", c_int32),
        ("token", TOKENS),
        ("embd", FLOATS),
        ("pos", TOKENS),
        ("n_seq_id", TOKENS),
        ("seq_id", POINTER(TOKENS)),
        ("logits", POINTER(c_int8)),
    )


# What a struct of the layout above holds when llama.cpp fills in its defaults. A field that moved
# shows here, before anything is read or written through it.
MODEL_DEFAULTS = {
    "n_gpu_layers": -1,
    "split_mode": 1,
    "load_mode": -1,
    "lazy_mode": 1,
    "main_gpu": 0,
    "tensor_split": None,
    "kv_overrides": None,
    "vocab_only": False,
    "check_tensors": False,
    "use_extra_bufts": True,
    "no_alloc": False,
}
CONTEXT_DEFAULTS = {
    "n_ctx": 512,
    "n_batch": 2048,
    "n_ubatch": 512,
    "n_seq_max": 1,
    "n_outputs_max": 0,
    "n_outputs_max_per_seq": 1,
    "n_threads": 4,
    "n_threads_batch": 4,
    "flash_attn_type": -1,
    "rope_freq_base": 0.0,
    "yarn_ext_factor": -1.0,
    "defrag_thold": -1.0,
    "cb_eval": None,
    "type_k": 1,
    "type_v": 1,
    "abort_callback": None,
    "unnamed": None,
    "embeddings": False,
    "offload_kqv": True,
    "no_perf": True,
    "op_offload": True,
    "swa_full": True,
    "kv_unified": False,
    "samplers": None,
    "n_samplers": 0,
    "ctx_other": None,
}

# Function → (result, arguments), from llama.h and ggml.h.
SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [LOG, c_void_p]),
    "llama_version": (c_char_p, []),
    "llama_print_system_info": (c_char_p, []),
    "llama_model_default_params": (ModelParams, []),
    "llama_context_default_params": (ContextParams, []),
    "llama_model_load_from_file": (c_void_p, [c_char_p, ModelParams]),
    "llama_model_free": (None, [c_void_p]),
    "llama_model_get_vocab": (c_void_p, [c_void_p]),
    "llama_vocab_n_tokens": (c_int32, [c_void_p]),
    "llama_vocab_bos": (c_int32, [c_void_p]),
    "llama_vocab_get_add_bos": (c_bool, [c_void_p]),
    "llama_model_n_ctx_train": (c_int32, [c_void_p]),
    "llama_tokenize": (c_int32, [c_void_p, c_char_p, c_int32, TOKENS, c_int32, c_bool, c_bool]),
    "llama_init_from_model": (c_void_p, [c_void_p, ContextParams]),
    "llama_free": (None, [c_void_p]),
    "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_memory_clear": (None, [c_void_p, c_bool]),
    "llama_decode": (c_int32, [c_void_p, Batch]),
    "llama_get_logits": (FLOATS, [c_void_p]),
    "ggml_cpu_init": (None, []),
    "ggml_quantize_requires_imatrix": (c_bool, [c_int32]),
    "ggml_quantize_chunk": (
        c_size_t,
        [c_int32, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p],
    ),
}


@dataclass(frozen=True)
class Library:
    """llama.cpp in this process; `errors` are the lines it has logged as errors, oldest first."""

    call: Any  # the functions of SIGNATURES
    errors: list[str]

    def model_params(self) -> ModelParams:
        params: ModelParams = self.call.llama_model_default_params()
        _check_defaults(params, MODEL_DEFAULTS)
        return params

    def context_params(self) -> ContextParams:
        params: ContextParams = self.call.llama_context_default_params()
        _check_defaults(params, CONTEXT_DEFAULTS)
        return params


def shared_library() -> Path | None:
    """The file of llama.cpp's functions, None where xllamacpp is not installed."""
    found = importlib.util.find_spec(PACKAGE)
    places = [] if found is None else list(found.submodule_search_locations or [])
    files = [file for place in places for file in sorted(Path(place).glob(f"{PACKAGE}*.so"))]
    return files[0] if files else None


@functools.cache
def library() -> Library:
    """llama.cpp, loaded once per process; its log is kept, not printed.

    Raises:
        ConfigError: where xllamacpp is missing, or holds a llama.cpp whose parameters lie otherwise.
    """
    file = shared_library()
    if file is None:
        raise ConfigError(
            f"llama.cpp is not here: the package {PACKAGE} is not installed; install exlq[eval] "
            "(Linux on x86-64)"
        )
    errors, log = _log()
    loaded = Library(_bound(file), errors)
    loaded.call.llama_log_set(log, None)
    loaded.model_params()
    loaded.context_params()
    loaded.call.llama_backend_init()
    loaded.call.ggml_cpu_init()
    return loaded


@functools.cache
def _log() -> tuple[list[str], Any]:
    """The lines logged as errors, and the function llama.cpp calls with them while the process runs."""
    errors: list[str] = []
    return errors, LOG(_Log(errors))


def _bound(file: Path) -> Any:
    try:
        library = ctypes.CDLL(str(file))
        for name, (result, arguments) in SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as exc:
        raise ConfigError(f"{file}: not the llama.cpp that was wanted ({exc}); upgrade exlq[eval]") from exc
    return library


def _check_defaults(params: Structure, wanted: Mapping[str, object]) -> None:
    for name, value in wanted.items():
        found = getattr(params, name)
        if found != value:
            raise ConfigError(
                f"llama.cpp's {type(params).__name__} has {name} {found}, {value} was wanted: this {PACKAGE} "
                "lays its parameters out otherwise; install the version exlq[eval] names"
            )


class _Log:
    """Keeps lines of the error level, put together again where llama.cpp logs them in parts."""

    def __init__(self, errors: list[str]) -> None:
        self._errors = errors
        self._open = False

    def __call__(self, level: int, text: bytes | None, _: object) -> None:
        part = (text or b"").decode("utf-8", "replace")
        if level == ERROR_LEVEL:
            self._errors.append(part.strip())
        elif level == CONTINUED_LEVEL and self._open:
            self._errors[-1] += part.rstrip()
        self._open = level == ERROR_LEVEL or (level == CONTINUED_LEVEL and self._open)
