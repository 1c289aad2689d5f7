"""A second device made of the CPU: tensors that say they are on "cuda" and refuse others beside them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
MEETING = {
    "copy_",
    "_to_copy",
    "index",
    "index_put_",
    "index_put",
    "_index_put_impl_",
}  # take both, as on a GPU


class Far(Tensor):
    """A tensor on the second device; `near` is on the CPU."""

    near: Tensor

    @staticmethod
    def __new__(cls: type[Far], near: Tensor) -> Far:
        made: Far = torch.Tensor._make_wrapper_subclass(
            cls,
            near.size(),
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            device=DEVICE,
        )
        made.near = near
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _run(func, args, kwargs or {}, None)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Far({self.near!r})"


class FarDevice(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, "cuda" is a device. `syncs` counts what the host waited for: values and copies to it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.syncs: Counter[str] = Counter()

    def __enter__(self) -> FarDevice:
        super().__enter__()  # type: ignore[no-untyped-call]
        self._tensor = torch.tensor
        torch.tensor = self._made  # type: ignore[assignment]
        return self

    def __exit__(self, *args: Any) -> None:
        torch.tensor = self._tensor
        super().__exit__(*args)  # type: ignore[no-untyped-call]

    def _made(self, values: Any, *, device: Any = None, **how: Any) -> Tensor:
        """`torch.tensor`, which reaches no dispatch mode."""
        made = self._tensor(values, **how)
        return made if device is None else made.to(device)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, self.syncs)


def _run(func: Any, args: Any, kwargs: dict[str, Any], syncs: Counter[str] | None) -> Any:
    name = func._schema.name.split("::")[1]
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    far = any(isinstance(each, Far) for each in tensors)
    near = [each for each in tensors if not isinstance(each, Far) and each.ndim]
    if far and near and name not in MEETING:
        shapes = [tuple(each.shape) for each in near]
        raise RuntimeError(f"{func} takes tensors on two devices, on the CPU {shapes}")
    wanted = kwargs.get("device")
    goes = far if wanted is None else torch.device(wanted) == DEVICE
    if wanted is not None and goes:
        kwargs = {**kwargs, "device": "cpu"}
    kwargs.pop("pin_memory", None)
    if syncs is not None and far and (name in ("_local_scalar_dense", "nonzero") or not goes):
        syncs[name] += 1
    real_args, real_kwargs = tree_map(_real, (args, kwargs))
    found = func(*real_args, **real_kwargs)
    mutated = [a for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    if mutated:
        named = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        given = [named[a.name] for a in mutated if a.name in named]
        if len(func._schema.returns) == 0:
            return found
        return given[0] if len(given) == 1 else tuple(given)
    return tree_map(lambda x: Far(x) if isinstance(x, Tensor) else x, found) if goes else found


def _real(x: Any) -> Any:
    return x.near if isinstance(x, Far) else x
