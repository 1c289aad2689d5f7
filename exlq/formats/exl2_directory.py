"""EXL2 model directories: reading any, writing ours."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from exlq.checkpoint.files import header_bytes
from exlq.errors import FormatError, ModelError
from exlq.files import read_json
from exlq.formats import exl2
from exlq.formats.shards import DTYPES, ShardWriter

_MEMBERS: Final = {
    "q_weight": (torch.int32, 2),
    "q_scale": (torch.int32, 2),
    "q_scale_max": (torch.float16, 1),
    "q_groups": (torch.int16, 1),
    "q_invperm": (torch.int32, 1),
}
_DERIVED = ("q_perm", "q_group_map")  # in files of others; the loader makes its own
_WEIGHT_SUFFIXES = tuple(".safetensors .bin .pt .pth .ckpt .gguf .h5 .msgpack .npz .onnx".split())
_LARGEST_COPIED_BYTES = 1 << 28
_DTYPE_OF = {name: dtype for dtype, name in DTYPES.items()}


def is_exl2(directory: Path) -> bool:
    """Whether a directory holds linears in EXL2, by its tensors: not every config.json says so."""
    try:
        return any(name.endswith(".q_weight") for name in _open_files(directory))
    except (FormatError, ModelError):
        return False


def check_linear(key: str, tensors: Mapping[str, Tensor]) -> None:
    """Holds the tensors of one linear against the rules of the format.

    Raises:
        FormatError: for a missing tensor, a wrong dtype or shape, groups that are out of order or
            do not fit, or a `q_invperm` that is no permutation.
    """
    for suffix, (dtype, dims) in _MEMBERS.items():
        if suffix not in tensors:
            raise FormatError(f"{key}.{suffix} is missing: an EXL2 linear has {', '.join(_MEMBERS)}")
        found = tensors[suffix]
        if found.dtype != dtype or found.ndim != dims:
            raise FormatError(
                f"{key}.{suffix} is {found.dtype} {tuple(found.shape)}, wanted {dtype} of {dims}-D"
            )
    columns, groups = tensors["q_weight"].shape[1], len(tensors["q_scale_max"])
    if not columns or columns % exl2.OUT_MULTIPLE:
        raise FormatError(f"{key}.q_weight has {columns} columns, wanted a multiple of {exl2.OUT_MULTIPLE}")
    shapes = {"q_scale": (groups, columns // 8), "q_groups": (2 * groups,)}
    if "bias" in tensors:
        shapes["bias"] = (columns,)
    for suffix, shape in shapes.items():
        if tuple(tensors[suffix].shape) != shape:
            raise FormatError(f"{key}.{suffix} has shape {tuple(tensors[suffix].shape)}, wanted {shape}")
    _check_groups(key, tensors)
    order = tensors["q_invperm"].sort().values
    if not torch.equal(order, torch.arange(len(order), dtype=torch.int32, device=order.device)):
        raise FormatError(f"{key}.q_invperm is no permutation of its {len(order)} rows")


def _check_groups(key: str, tensors: Mapping[str, Tensor]) -> None:
    if not len(tensors["q_groups"]) or tensors["q_groups"][1] != 0:
        raise FormatError(f"{key}.q_groups does not begin at row 0 of q_weight")
    try:
        groups = exl2.stored_groups(tensors)
    except FormatError as exc:
        raise FormatError(f"{key}: {exc}") from exc
    for group in groups:
        if group.size % (16 if group.bits == 2 else 32):  # the reference allows half a block for 2 bits
            raise FormatError(
                f"{key}.q_groups has a {group.bits}-bit group of {group.size} rows, wanted blocks of 32"
            )


class Exl2Weights:
    """`Weights` over an EXL2 directory, ours or another tool's.

    A linear `<key>.q_*` is given as `<key>.weight`, (out_features, in_features) float16, exactly as
    ExLlamaV2 computes with it, its padding cut off by the sizes in config.json; all else as it is
    stored. `linears` are the keys of the linears. Every `*.safetensors` file is read, as the loader
    does, and no index. The linear read last is kept; what is read must not be modified.

    Raises:
        ModelError: if there is no directory, config.json or weights, or for an unknown name.
        FormatError: for a file or a linear that breaks the rules of its format.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._files = _open_files(directory)
        self.linears = [name.removesuffix(".q_weight") for name in self._files if name.endswith(".q_weight")]
        self._out_features = _out_features(_read_config(directory))
        self._names = self._public_names()
        self._kept: tuple[str, Tensor] | None = None

    def tensors(self, key: str) -> dict[str, Tensor]:
        """What is stored of one linear, checked, the bias included."""
        names = [suffix for suffix in (*_MEMBERS, "bias") if f"{key}.{suffix}" in self._files]
        tensors = {suffix: self._read(f"{key}.{suffix}") for suffix in names}
        check_linear(key, tensors)
        return tensors

    def keys(self) -> Collection[str]:
        return self._names.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape without reading the data, padding cut off; raises ModelError for an unknown name."""
        linear = self._linear_of(key)
        if linear is None:
            return self._stored_shape(key)
        if key.endswith(".bias"):
            return (self._rows(linear),)
        return self._rows(linear), *self._stored_shape(f"{linear}.q_invperm")

    def dtype(self, key: str) -> torch.dtype:
        if self._linear_of(key) is not None:
            return torch.float16
        name = self._files[key].get_slice(key).get_dtype()
        if name not in _DTYPE_OF:
            raise FormatError(f"{key} in {self.directory} is {name}, wanted one of {', '.join(_DTYPE_OF)}")
        return _DTYPE_OF[name]

    def read(self, key: str, rows: slice | Tensor | None = None) -> Tensor:
        """The tensor, or only the given rows of its first dimension."""
        linear = self._linear_of(key)
        if linear is None:
            whole = self._read(key)
        elif key.endswith(".bias"):
            whole = self._read(key)[: self._rows(linear)]
        else:
            whole = self._dequantized(linear)
        if rows is None:
            return whole
        return whole[rows] if isinstance(rows, slice) else whole[rows.cpu()]

    def _dequantized(self, linear: str) -> Tensor:
        if self._kept is None or self._kept[0] != linear:
            self._kept = None  # two large ones need not be in memory together
            self._kept = linear, exl2.dequantize_linear(self.tensors(linear))[: self._rows(linear)]
        return self._kept[1]

    def _public_names(self) -> dict[str, str | None]:
        """Each name given out, with the linear it belongs to."""
        hidden = {f"{key}.{suffix}" for key in self.linears for suffix in (*_MEMBERS, *_DERIVED)}
        names: dict[str, str | None] = {name: None for name in self._files if name not in hidden}
        for key in self.linears:
            for suffix in _MEMBERS:
                if f"{key}.{suffix}" not in self._files:
                    raise FormatError(f"{self.directory}: {key}.{suffix} is missing beside {key}.q_weight")
            names[f"{key}.weight"] = key
            if f"{key}.bias" in names:
                names[f"{key}.bias"] = key
        return names

    def _rows(self, linear: str) -> int:
        """Output features without padding, as far as config.json tells."""
        stored = self._stored_shape(f"{linear}.q_weight")[-1]
        wanted = self._out_features.get(linear.rpartition(".")[2], stored)
        return wanted if exl2.padded_out_features(wanted) == stored else stored

    def _linear_of(self, key: str) -> str | None:
        if key not in self._names:
            raise ModelError(f"no tensor {key} in {self.directory}; it has {len(self._names)} others")
        return self._names[key]

    def _stored_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[name].get_slice(name).get_shape())

    def _read(self, name: str) -> Tensor:
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor


def _open_files(directory: Path) -> dict[str, Any]:
    """The open file of every stored tensor."""
    files: dict[str, Any] = {}
    for path in sorted(directory.glob("*.safetensors")):
        header_bytes(path)
        try:
            file: Any = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as exc:
            raise FormatError(f"{path} is not a whole safetensors file ({exc}): copy it again") from exc
        for name in file.keys():  # noqa: SIM118
            if name in files:
                raise FormatError(f"{path} holds {name}, which another file of {directory} holds too")
            files[name] = file
    if not files:
        raise ModelError(f"no *.safetensors in {directory}; wanted an EXL2 model directory")
    return files


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    try:
        return dict(read_json(path))
    except (OSError, ValueError, TypeError) as exc:
        raise ModelError(f"{path} is no JSON object ({exc}); wanted an EXL2 model directory") from exc


def _out_features(config: Mapping[str, Any]) -> dict[str, int]:
    """Output features by the last part of a linear's name, of those config.json gives."""
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    inner, vocab = config.get("intermediate_size"), config.get("vocab_size")
    inner = config.get("moe_intermediate_size") or inner
    found = {"o_proj": hidden, "down_proj": hidden, "gate_proj": inner, "up_proj": inner, "lm_head": vocab}
    found |= {"w1": inner, "w2": hidden, "w3": inner}
    if hidden and heads:
        head_dim = config.get("head_dim") or hidden // heads
        shared = (config.get("num_key_value_heads") or heads) * head_dim
        found |= {"q_proj": heads * head_dim, "k_proj": shared, "v_proj": shared}
    return {name: size for name, size in found.items() if isinstance(size, int)}


class Exl2Writer:
    """Writes a model directory as tensors come.

    Args:
        directory: exists, is empty, and is the caller's to rename into place after `close`.
        shard_bytes: no file of tensors grows beyond this; None for one file.
    """

    def __init__(self, directory: Path, shard_bytes: int | None = None) -> None:
        self._directory = directory
        self._shards = ShardWriter(directory, shard_bytes=shard_bytes)

    def add_linear(self, key: str, tensors: Mapping[str, Tensor], bias: Tensor | None = None) -> None:
        """Appends one quantized linear; `bias` is (out_features,) and is padded here.

        Raises:
            FormatError: if the tensors break the rules of the format.
        """
        stored = {suffix: tensors[suffix] for suffix in _MEMBERS if suffix in tensors}
        check_linear(key, stored)
        if bias is not None:
            padding = stored["q_weight"].shape[1] - len(bias)
            if not 0 <= padding < exl2.OUT_MULTIPLE:
                raise FormatError(
                    f"{key}.bias has {len(bias)} values for {stored['q_weight'].shape[1]} columns"
                )
            stored["bias"] = torch.nn.functional.pad(_as_half(f"{key}.bias", bias), (0, padding))
        for suffix, tensor in stored.items():
            self._shards.add(f"{key}.{suffix}", tensor)

    def add_plain(self, name: str, tensor: Tensor) -> None:
        """Appends one tensor as float16; FormatError if it does not fit into that."""
        self._shards.add(name, _as_half(name, tensor))

    def close(self, config: Mapping[str, Any], source: Path) -> tuple[Path, ...]:
        """Finishes the shards, whose paths are returned, and completes the directory.

        Copied are the files beside the source's weights: tokenizer, generation settings, chat
        template, licence. The weights' index and the source's model card are not.
        """
        written = self._shards.close()
        for path in sorted(source.iterdir()):
            if _belongs_beside(path):
                shutil.copyfile(path, self._directory / path.name)
        text = json.dumps(config, indent=4, ensure_ascii=False) + "\n"
        (self._directory / "config.json").write_text(text, encoding="utf-8", newline="\n")
        return written

    def abandon(self) -> None:
        """Closes and removes what was written so far."""
        self._shards.abandon()


def _as_half(name: str, tensor: Tensor) -> Tensor:
    half = tensor.half()
    if not half.isfinite().all():
        largest = tensor.abs().max().item()
        raise FormatError(
            f"{name} has values up to {largest:.6g}, EXL2 keeps it in float16, which ends at 65504"
        )
    return half


def _belongs_beside(path: Path) -> bool:
    name = path.name
    if not path.is_file() or name == "config.json" or name.startswith((".", "README")):
        return False
    if name.endswith((*_WEIGHT_SUFFIXES, ".index.json")):
        return False
    return path.stat().st_size <= _LARGEST_COPIED_BYTES
