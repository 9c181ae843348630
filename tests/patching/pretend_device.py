"""Device that pretends to be a GPU: it computes on the CPU, and refuses what a GPU refuses.

Its tensors have a class of their own. A function that receives them together with CPU tensors raises an error, unless
it copies or indexes, or the CPU tensor is a single number. Calls that make the host wait are recorded. Kernels, half
precision, streams, and memory of a GPU are not simulated.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("cuda", 0)
WAITS = frozenset("item tolist __bool__ __int__ __float__ __index__ nonzero unique equal cpu numpy".split())
UPLOADS = frozenset("to tensor new_tensor as_tensor".split())
COPIES = frozenset("copy_ __getitem__ __setitem__ to index_put_ __get__ __set__".split())


class OnDevice(torch.Tensor):
    """Tensor on the device."""

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return self.clone()


class PretendDevice(TorchFunctionMode):
    """Mode that creates tensors on the device if requested, and keeps results of its tensors there."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __enter__(self) -> PretendDevice:
        self._patches = ExitStack()
        for where, name, new in (
            (torch, "vmap", functools.partial(vmap_here, torch.vmap)),
            (torch.cuda, "current_device", lambda: DEVICE.index),
        ):
            self._patches.enter_context(mock.patch.object(where, name, new))
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._patches.close()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if func in _device_constructors() and kwargs.get("device") is None:
            kwargs["device"] = torch.get_default_device()
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        on_device = any(isinstance(tensor, OnDevice) for tensor in tensors)
        with torch._C.DisableTorchFunction():
            strangers = [tensor for tensor in tensors if not isinstance(tensor, OnDevice) and tensor.ndim]
        if func == torch.Tensor.device.__get__ and on_device:
            return DEVICE
        foreign = name == "__getitem__" and not isinstance(args[0], OnDevice)  # the CPU takes no index of a GPU
        if on_device and strangers and (foreign or name not in COPIES):
            raise RuntimeError(f"Expected all tensors to be on the same device, in {name}")
        stays = on_device
        for target in filter(is_device, tree_leaves((args, kwargs))):
            stays = torch.device(target).type == DEVICE.type
        if name == "to" and isinstance(args[-1], torch.Tensor) and len(args) > 1:
            stays = isinstance(args[-1], OnDevice)
        stays &= name not in ("cpu", "numpy")
        brings = stays and name in UPLOADS and not (name == "to" and is_here(args[0]))
        if brings or (on_device and (name in WAITS or (name == "to" and not stays))):
            self.waits.append(name)
        args, kwargs = tree_map(lambda leaf: "cpu" if is_device(leaf) else leaf, (args, kwargs))
        kind = OnDevice if stays else torch.Tensor

        def put(leaf: Any) -> Any:
            return leaf.as_subclass(kind) if isinstance(leaf, torch.Tensor) and type(leaf) is not kind else leaf

        with torch._C.DisableTorchFunction():
            return tree_map(put, func(*args, **kwargs))


def vmap_here(vmap: Callable[..., Any], func: Callable[..., Any], in_dims: Any) -> Callable[..., Any]:
    """Call `torch.vmap`, inside which tensors lose their class."""
    return lambda *args: tree_map(lambda leaf: leaf.as_subclass(type(args[0])), vmap(func, in_dims)(*args))


def is_here(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is on the device. Inside vmap, all tensors are, but they have lost their class."""
    return isinstance(tensor, OnDevice) or torch._C._functorch.is_batchedtensor(tensor)


def is_device(leaf: Any) -> bool:
    return isinstance(leaf, torch.device) or (isinstance(leaf, str) and leaf in ("cpu", "cuda", "cuda:0"))


def moved(model: nn.Module) -> nn.Module:
    """Move the parameters, buffers and other tensors of a model to the device, in place."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers, vars(module)):
            for name, tensor in tensors.items():
                if isinstance(tensor, torch.Tensor) and not isinstance(tensor, OnDevice):
                    parameter = isinstance(tensor, nn.Parameter)
                    tensors[name] = tensor.detach().as_subclass(OnDevice)
                    tensors[name]._is_param = parameter  # what isinstance(..., nn.Parameter) asks for
    return model
