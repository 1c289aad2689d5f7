"""What a GGUF file says of its model, whatever its tensors are stored as."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gguf import GGML_QUANT_VERSION, GGUFValueType

from exlq import __version__
from exlq.checkpoint.open import open_checkpoint
from exlq.errors import FormatError, ModelError
from exlq.files import sha256_file
from exlq.formats.gguf import metadata, template, tensors
from exlq.formats.gguf.experts import expert_count
from exlq.formats.gguf.reader import GgufFile
from exlq.formats.gguf.recipes import Shape
from exlq.formats.gguf.template import OWN_KEYS
from exlq.formats.gguf.tensors import Entry
from exlq.formats.gguf.tokenizer import tokenizer_metadata
from exlq.formats.gguf.values import KeyValue
from exlq.models.config import read_json
from exlq.models.model import Model
from exlq.models.open import open_model
from exlq.pipeline.allocate import Choice
from exlq.pipeline.plan import Plan
from exlq.recipes.prediction import predicted
from exlq.types import GgufFamily, Weights

# Architectures whose sliding window llama.cpp ignores.
WITHOUT_WINDOW = ("llama", "qwen2", "qwen3", "phi3", "qwen2moe", "qwen3moe")


@dataclass(frozen=True)
class Description:
    """The tensors, in their order; metadata that does not hang on their types; the shape recipes ask for.

    `notes` say where llama.cpp will run the model otherwise than transformers does.
    """

    entries: tuple[Entry, ...]
    metadata: tuple[KeyValue, ...]
    shape: Shape
    notes: tuple[str, ...] = ()


def described(plan: Plan) -> Description:
    """The description, taken from the template where one is given.

    Raises:
        ModelError: if llama.cpp cannot run the model or its tokenizer, or the template is of another model.
    """
    return _converted(plan) if plan.config.gguf_template is None else _templated(plan)


def whole_metadata(plan: Plan, told: Description, choice: Choice, file_type: int) -> list[KeyValue]:
    """Every entry of the file: the model's own, what its tensors are, where they come from."""
    kinds = {"general.file_type": file_type, "general.quantization_version": GGML_QUANT_VERSION}
    stored = [KeyValue(key, value, GGUFValueType.UINT32) for key, value in kinds.items()]
    return [*told.metadata, *stored, *_provenance(plan, choice)]


def _converted(plan: Plan) -> Description:
    model, directory = plan.model, plan.config.in_dir
    family = model.family.gguf
    if family is None:
        raise ModelError(f"llama.cpp does not know {model.family.architectures[0]}; choose another --format")
    config = metadata.completed(read_json(directory))
    heads, kv_heads = metadata.head_counts(config)
    parameters = metadata.hyper_parameters(config, family)  # refuses what llama.cpp computes otherwise
    n_weights = sum(spec.numel for spec in plan.specs.values()) - (model.head.numel if model.tied else 0)
    general = metadata.general(directory, directory.resolve().name, family.architecture, n_weights, 0)
    return Description(
        tensors.file_tensors(model.weights, config, family, _ties(model), model.tied),
        (
            *(entry for entry in general if entry.key not in OWN_KEYS),
            *parameters,
            *tokenizer_metadata(directory, model.vocab_size, plan.config.tokenizer_pre),
        ),
        Shape(family.architecture, model.n_blocks, heads, kv_heads, expert_count(config)),
        _notes(config, family, model),
    )


def _notes(config: Mapping[str, Any], family: GgufFamily, model: Model) -> tuple[str, ...]:
    window = config.get("sliding_window")
    unused = config.get("use_sliding_window") is False or family.architecture not in WITHOUT_WINDOW
    if unused or not window or window >= model.max_length:
        return ()
    return (f"llama.cpp attends to all tokens in this family, not only to the last {window}",)


def _templated(plan: Plan) -> Description:
    assert plan.config.gguf_template is not None
    try:
        with GgufFile(plan.config.gguf_template) as file:
            found = template.template_tensors(_base_weights(plan), file, _ties(plan.model))
            return Description(found, tuple(template.template_metadata(file)), template.template_shape(file))
    except FormatError as exc:
        raise ModelError(f"--gguf-template: {exc}") from exc


def _base_weights(plan: Plan) -> Weights:
    """The model's weights with their channels as a template has them."""
    if not plan.config.permute_mlp:
        return plan.model.weights
    directory = plan.config.in_dir
    return open_model(directory, open_checkpoint(directory), device=plan.model.device).weights


def _ties(model: Model) -> dict[str, str]:
    """The key of the fused matrix, by the key of each of its linears."""
    linears = (linear for index in range(model.n_blocks) for linear in model.linears(index))
    return {linear.spec.key: linear.tie for linear in linears if linear.tie is not None}


def _provenance(plan: Plan, choice: Choice) -> list[KeyValue]:
    """What the bytes were determined by; nothing of the machine, the day or the command."""
    config, record = plan.config, plan.rows.record
    target = " ".join(f"{flag} {value}" for flag, value in config.targets.items())
    found: dict[str, str | int | float | bool] = {
        "exlq.version": __version__,
        "exlq.target": target,
        "exlq.rounding": config.rounding,
        "exlq.bits_per_weight": choice.bpw,
        "exlq.settings.sha256": _settings_sha256(plan),
    }
    if (prediction := predicted(choice.loss, config.corrects)) is not None:
        found["exlq.predicted_kl"] = prediction.kl
    if config.weighted:
        found |= {
            "exlq.calibration.sha256": record.sha256,
            "exlq.calibration.rows": record.rows,
            "exlq.calibration.row_length": record.row_length,
            "exlq.calibration.seed": record.seed,
        }
    if config.permute_mlp:
        found["exlq.permute_mlp"] = True
    kinds = {
        str: GGUFValueType.STRING,
        bool: GGUFValueType.BOOL,
        int: GGUFValueType.UINT32,
        float: GGUFValueType.FLOAT64,
    }
    return [KeyValue(key, value, kinds[type(value)]) for key, value in found.items()]


def _settings_sha256(plan: Plan) -> str:
    """Of all settings that choose levels or types, the model's own files among them."""
    config = plan.config
    settings: Mapping[str, object] = {
        "origin": plan.origin,
        "targets": config.targets,
        "recipe": None if config.recipe is None else sha256_file(config.recipe),
        "head_bits": config.head_bits,
        "tensor_types": config.tensor_types,
        "output_tensor_type": config.output_tensor_type,
        "token_embedding_type": config.token_embedding_type,
        "rounding": config.rounding,
        "row_mode": config.row_mode,
        "random_share": config.random_share,
        "parse_special": config.parse_special,
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=dict).encode()).hexdigest()
