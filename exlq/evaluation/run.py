"""An evaluation from model directories, GGUF files and a text file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from exlq.calibration import evaluation_chunks, load_tokenizer, row_length
from exlq.checkpoint.files import find_weight_files
from exlq.checkpoint.open import open_checkpoint
from exlq.errors import ConfigError, FormatError, ModelError
from exlq.evaluation.dequantized import infos_of_copy
from exlq.evaluation.divergence import Divergence, against
from exlq.evaluation.gguf_model import open_gguf, with_weights
from exlq.evaluation.gguf_text import gguf_chunks
from exlq.evaluation.llamacpp import Runtime
from exlq.evaluation.predictor import LEAST_CONTEXT, Blockwise, InLlamaCpp, Predictor
from exlq.formats.exl2_directory import Exl2Weights, is_exl2
from exlq.models.model import Model
from exlq.models.open import open_model
from exlq.names import LLAMA_CPP, TORCH
from exlq.numerics.precision import exact_products, quick_products
from exlq.types import Weights
from exlq.workspace import Workspace

DEFAULT_CONTEXT = 512
LEAST_TOKENS = 3  # of a chunk, whose second half has one token to be predicted


@dataclass(frozen=True)
class Settings:
    """How models are evaluated.

    `context` counts tokens in a chunk; 512, or the base's maximum if that is less, where None. `runtime`
    is what runs GGUF files; directories run in torch. With `weights_only` llama.cpp runs their weights
    dequantized to float32: what the weights lost, without what its kernels do to activations.
    """

    context: int | None = None
    max_chunks: int | None = None
    text_column: str | None = None
    device: str = "cpu"
    runtime: str = TORCH
    weights_only: bool = False
    threads: int = 1

    def __post_init__(self) -> None:
        if self.runtime not in RUNNERS:
            raise ConfigError(f"--runtime {self.runtime}: one of {', '.join(RUNNERS)} was wanted")
        if self.weights_only and self.runtime != LLAMA_CPP:
            raise ConfigError(
                f"--weights-only with --runtime {self.runtime}: torch runs the weights alone anyway; "
                f"it goes with --runtime {LLAMA_CPP}"
            )


@dataclass(frozen=True)
class Evaluation:
    """What became of one model; `n_bytes` are those of all its weight files."""

    model: Path
    n_bytes: int
    found: Divergence


def evaluate(
    model_dir: Path,
    base_dir: Path,
    text: Path,
    scratch: Path,
    *,
    context: int | None = None,
    max_chunks: int | None = None,
    text_column: str | None = None,
    device: str = "cpu",
) -> Divergence:
    """Compares one model with its base in torch; see `evaluate_all`."""
    settings = Settings(context, max_chunks, text_column, device)
    return evaluate_all([model_dir], base_dir, text, scratch, settings)[0].found


@quick_products()
def evaluate_all(
    models: Sequence[Path], base: Path, text: Path, scratch: Path, settings: Settings
) -> list[Evaluation]:
    """Compares each model with the base on a parquet file's text.

    Args:
        models: EXL2 or Hugging Face directories, or GGUF files, of split ones the first.
        base: a Hugging Face directory, or a GGUF file where llama.cpp is the runtime.
        scratch: an empty directory for working files.

    Raises:
        InputError: if a model, the text or a setting cannot be used.
    """
    with ExitStack() as files:
        place = _Place(base, scratch, usable_device(settings.device), settings, files)
        first = _predictor(place, base, "base")
        others = [_predictor(place, model, f"model-{i}") for i, model in enumerate(models)]
        for model, other in zip(models, others, strict=True):
            _check_vocabulary(base, first, model, other)
        chunks = _chunks(place, text, first.max_length)
        evaluations = []
        with against(first, chunks) as compared:
            for i, (model, other) in enumerate(zip(models, others, strict=True)):
                evaluations.append(Evaluation(model, weight_bytes(model), compared(other)))
                _copy(place, f"model-{i}").unlink(missing_ok=True)
    return evaluations


def open_any(directory: Path, device: torch.device) -> Model:
    """The model in an EXL2 or a Hugging Face directory."""
    if not directory.is_dir():
        raise ModelError(f"{directory}: no such directory, a model directory was wanted; check the path")
    weights: Weights = Exl2Weights(directory) if is_exl2(directory) else open_checkpoint(directory)
    return open_model(directory, weights, device=device)


def usable_device(name: str) -> torch.device:
    """The device of that name, tried out.

    Raises:
        ConfigError: if torch has no such device here.
    """
    try:
        device = torch.device(name)
        float(torch.zeros(1, device=device)[0])
    except (RuntimeError, AssertionError) as exc:
        raise ConfigError(f"--device {name}: torch cannot use it here; cpu always works") from exc
    if device.type == "cuda":
        exact_products()
    return device


def is_gguf(path: Path) -> bool:
    """Whether a path means a GGUF file, there or not, rather than a directory."""
    return path.is_file() or (path.suffix == ".gguf" and not path.is_dir())


def weight_bytes(model: Path) -> int:
    """Bytes of the weight files of a directory, or of a GGUF file with all its shards."""
    if is_gguf(model):
        with open_gguf(model) as file:
            return file.n_bytes
    return sum((model / name).stat().st_size for name in find_weight_files(model).names)


@dataclass(frozen=True)
class _Place:
    base: Path
    scratch: Path
    device: torch.device
    settings: Settings
    files: ExitStack  # what closes those that stay open


def _check_vocabulary(base: Path, first: Predictor, model: Path, other: Predictor) -> None:
    if other.vocab_size != first.vocab_size:
        raise ModelError(
            f"{model} has {other.vocab_size} tokens, {base} has {first.vocab_size}: "
            "give the base the model was made of"
        )


def _predictor(place: _Place, path: Path, name: str) -> Predictor:
    """What runs a model; nothing but its tables and small tensors is read yet."""
    if is_gguf(path):
        return RUNNERS[place.settings.runtime](place, path, name)
    return Blockwise(open_any(path, place.device), Workspace(place.scratch), name)


def _gguf_in_torch(place: _Place, path: Path, name: str) -> Predictor:
    """The file's weights, dequantized block by block, in the model the base's directory describes."""
    if is_gguf(place.base):
        raise ConfigError(
            f"--base {place.base} with --runtime {TORCH}: torch wants the model's directory; give that, "
            f"or --runtime {LLAMA_CPP}"
        )
    base = open_any(place.base, place.device)
    file = place.files.enter_context(open_gguf(path))
    return Blockwise(with_weights(base, place.base, file), Workspace(place.scratch), name)


def _gguf_in_llama_cpp(place: _Place, path: Path, name: str) -> Predictor:
    settings = place.settings
    if not settings.weights_only:
        return InLlamaCpp(path, settings.threads)
    with open_gguf(path) as file:
        try:
            infos_of_copy(file)
        except FormatError as exc:
            raise ModelError(str(exc)) from exc
    return InLlamaCpp(path, settings.threads, _copy(place, name))


def _copy(place: _Place, name: str) -> Path:
    """Where the dequantized copy of a GGUF file is put."""
    return place.scratch / f"{name}.gguf"


def _chunks(place: _Place, text: Path, longest: int) -> Tensor:
    settings = place.settings
    wanted = min(DEFAULT_CONTEXT, longest) if settings.context is None else settings.context
    context = row_length(wanted, longest)
    if context < LEAST_TOKENS:
        raise ConfigError(f"--ctx {context}: at least {LEAST_TOKENS} is wanted, half of it is scored")
    if not is_gguf(place.base):
        tokenizer = load_tokenizer(place.base)
        return evaluation_chunks(text, tokenizer, context, settings.max_chunks, settings.text_column)
    with Runtime(place.base, context=LEAST_CONTEXT) as runtime:
        return gguf_chunks(text, runtime, context, settings.max_chunks, settings.text_column)


RUNNERS: dict[str, Callable[[_Place, Path, str], Predictor]] = {
    TORCH: _gguf_in_torch,
    LLAMA_CPP: _gguf_in_llama_cpp,
}
