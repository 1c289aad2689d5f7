"""llama.cpp itself as a runtime: logits of every position, its tokenizer, its stock quantizer."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from ctypes import c_int8, c_int32
from importlib.metadata import version as package_version
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from exlq.errors import ConfigError, FormatError, ModelError
from exlq.evaluation.llamacpp_api import (
    FLASH_ATTENTION_OFF,
    PACKAGE,
    TYPE_F32,
    Batch,
    library,
    shared_library,
)

# Types of ggml that ggml_quantize_chunk does not write.
NOT_WRITTEN = {"F64", "I8", "I16", "I32", "I64", "Q8_1", "Q8_K"}


def available() -> bool:
    """Whether llama.cpp is installed (the package xllamacpp)."""
    return shared_library() is not None


class Runtime:
    """A GGUF file run by llama.cpp on the CPU, to be closed or used as a context manager.

    Keys and values are cached in float32 and flash attention is off, so that what is left between two
    runtimes of float32 weights is the order of sums. Matrix products are llama.cpp's own: with
    quantized weights they quantize the activations too.

    Raises:
        ConfigError: where llama.cpp is not installed.
        ModelError: if it cannot load the file, in its own words.
    """

    def __init__(self, path: Path, *, context: int = 512, threads: int = 1, batch: int | None = None) -> None:
        """Loads the file; the first of a split one is enough.

        Args:
            context: tokens a row may have.
            batch: of which so many go through the model at once; all where None.
        """
        self._library = library()
        self._call = self._library.call
        self._context = self._model = None
        self._length = context
        self.path = path
        if not path.is_file():
            raise ModelError(f"{path}: no such file, a GGUF file was wanted; check the path")
        self._library.errors.clear()
        self._model = self._load()
        self._vocab = self._call.llama_model_get_vocab(self._model)
        self._context = self._open(threads, batch or context)

    @property
    def vocab_size(self) -> int:
        return int(self._call.llama_vocab_n_tokens(self._vocab))

    @property
    def max_length(self) -> int:
        """Tokens a row may have at most, as the file says."""
        return int(self._call.llama_model_n_ctx_train(self._model))

    @property
    def bos_id(self) -> int | None:
        """The token put in front of a text, None if there is none."""
        if not self._call.llama_vocab_get_add_bos(self._vocab):
            return None
        return int(self._call.llama_vocab_bos(self._vocab))

    @property
    def describe(self) -> str:
        """Which llama.cpp this is and what it uses of the machine."""
        version = self._call.llama_version().decode()
        system = self._call.llama_print_system_info().decode().strip(" |")
        return f"llama.cpp {version} of {PACKAGE} {package_version(PACKAGE)}, {system}"

    def logits(self, ids: Tensor, first: int = 0) -> Tensor:
        """(n - first, vocab) float32 at the positions from `first` on of (n,) int64 tokens, alone."""
        n = len(ids)
        if not 0 < n <= self._length:
            raise ConfigError(f"{n} tokens in a row, 1 to {self._length} fit; open it with a larger context")
        if int(ids.min()) < 0 or int(ids.max()) >= self.vocab_size:
            raise ModelError(
                f"{self.path}: tokens {int(ids.min())} to {int(ids.max())} were given, it has "
                f"{self.vocab_size}; use the tokenizer it was made with"
            )
        self._library.errors.clear()
        self._call.llama_memory_clear(self._call.llama_get_memory(self._context), True)
        wanted = [int(position >= first) for position in range(n)]
        batch = Batch(n_tokens=n, token=(c_int32 * n)(*ids.tolist()), logits=(c_int8 * n)(*wanted))
        status = self._call.llama_decode(self._context, batch)
        if status:
            raise ModelError(f"{self.path}: llama.cpp cannot run it (status {status}): {self._reason()}")
        found = self._call.llama_get_logits(self._context)
        return torch.from_numpy(np.ctypeslib.as_array(found, (sum(wanted), self.vocab_size)).copy())

    def tokenize(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """Tokens of a text by the file's own tokenizer.

        Args:
            add_special: BOS in front where the file says so.
            parse_special: the spelling of a special token becomes that token.
        """
        raw = text.encode("utf-8")
        size = len(raw) + 16
        while True:
            found = (c_int32 * size)()
            n = self._call.llama_tokenize(self._vocab, raw, len(raw), found, size, add_special, parse_special)
            if n >= 0:
                return list(found[:n])
            if -n <= size:
                raise ModelError(f"{self.path}: llama.cpp cannot tokenize with it: {self._reason()}")
            size = -n

    def close(self) -> None:
        """Frees model and context; closing twice is harmless."""
        if self._context is not None:
            self._call.llama_free(self._context)
        if self._model is not None:
            self._call.llama_model_free(self._model)
        self._context = self._model = None

    def __enter__(self) -> Runtime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _load(self) -> int:
        params = self._library.model_params()
        params.n_gpu_layers = 0
        model = self._call.llama_model_load_from_file(str(self.path).encode(), params)
        if not model:
            raise ModelError(f"{self.path}: llama.cpp cannot load it: {self._reason()}")
        return int(model)

    def _open(self, threads: int, batch: int) -> int:
        params = self._library.context_params()
        params.n_ctx = params.n_batch = self._length
        params.n_ubatch = batch
        params.n_threads = params.n_threads_batch = threads
        params.n_outputs_max = params.n_outputs_max_per_seq = self._length
        params.type_k = params.type_v = TYPE_F32
        params.flash_attn_type = FLASH_ATTENTION_OFF
        params.offload_kqv = params.op_offload = False
        context = self._call.llama_init_from_model(self._model, params)
        if not context:
            self.close()
            raise ModelError(f"{self.path}: llama.cpp cannot make a context of it: {self._reason()}")
        return int(context)

    def _reason(self) -> str:
        """What llama.cpp logged first: the cause; what it logs after that passes the failure on."""
        return (self._library.errors or ["it gave no reason"])[0]


def quantize_chunk(
    type_name: str, weight: Tensor, importance: Tensor | None = None, threads: int = 1
) -> Tensor:
    """llama.cpp's stock quantizer: (rows, row_bytes) uint8.

    Args:
        type_name: as ggml has it, `Q4_K`.
        weight: (rows, in_features) float32. Not modified.
        importance: (in_features,) float32, the mean squared activation of each input channel.
        threads: rows are shared among them.

    Raises:
        ConfigError: where llama.cpp is not installed.
        FormatError: if the type cannot be written, or a row is not a whole number of its blocks.
    """
    kind, (rows, in_features) = _quantizable(type_name, importance), weight.shape
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if in_features % block:
        raise FormatError(f"{in_features} input channels in {type_name}: a multiple of {block} was wanted")
    if importance is not None and importance.shape != (in_features,):
        raise FormatError(f"importance of shape {tuple(importance.shape)}: ({in_features},) was wanted")
    source = weight.detach().to("cpu", torch.float32).contiguous()
    weights = None if importance is None else importance.detach().to("cpu", torch.float32).contiguous()
    packed = torch.empty(rows, in_features // block * block_bytes, dtype=torch.uint8)
    at = (source.data_ptr(), packed.data_ptr(), None if weights is None else weights.data_ptr())
    quantize = library().call.ggml_quantize_chunk
    step = max(1, -(-rows // threads))

    def part(begin: int) -> None:
        quantize(kind.value, at[0], at[1], begin * in_features, min(step, rows - begin), in_features, at[2])

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(part, range(0, rows, step)))
    return packed


def _quantizable(type_name: str, importance: Tensor | None) -> GGMLQuantizationType:
    """The type of that name; llama.cpp ends the process where it cannot write one."""
    kinds = {name: kind for name, kind in GGMLQuantizationType.__members__.items() if name not in NOT_WRITTEN}
    if type_name not in kinds:
        raise FormatError(
            f"{type_name}: llama.cpp does not quantize to it; one of {', '.join(kinds)} is wanted"
        )
    kind: GGMLQuantizationType = kinds[type_name]
    if importance is None and library().call.ggml_quantize_requires_imatrix(kind.value):
        raise FormatError(f"{type_name}: llama.cpp quantizes to it with importance alone; give some")
    return kind
