"""Phases that turn nothing, by which a model multiplies at no cost.

Every family applies its phases as `x * cos + rotate_half(x) * sin` or much like it: ten passes over memory, on a GPU a
sixth of the time of attention over 32k tokens, in order to leave queries and keys as they are. These cosines and
sines are tensors of ones and zeros, but products with ones, and sums with such zeros, are not computed.
"""

from __future__ import annotations

from typing import Any

import torch

PRODUCTS = frozenset((torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__))
SUMS = frozenset((torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__))
VIEWS = frozenset(
    (
        torch.unsqueeze,
        torch.Tensor.unsqueeze,
        torch.Tensor.__getitem__,
        torch.Tensor.repeat_interleave,
        torch.Tensor.to,
    )
)
"""What leaves ones ones and zeros zeros, of all that models do to phases before they apply them."""


MANY = 1024
"""Tokens from which it is worth it: in Python, this takes a layer a tenth of a millisecond."""


class Unturned(torch.Tensor):
    """Ones or zeros. All other operations give what they give, in tensors like any."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func in VIEWS:
                return func(*args, **(kwargs or {})).as_subclass(cls)
            if func in PRODUCTS or func in SUMS:
                constant, states = args if isinstance(args[0], Unturned) else reversed(args)
                if not kwargs and _leaves_its_form(constant, states):
                    if isinstance(constant, Ones if func in PRODUCTS else Zeros):
                        return states
                    if func in PRODUCTS:
                        return constant.expand(states.shape).as_subclass(Zeros)
            return func(*args, **(kwargs or {}))


class Ones(Unturned):
    """Cosines."""


class Zeros(Unturned):
    """Sines, and products with them."""


def worth_it(like: torch.Tensor) -> bool:
    """Whether phases (..., tokens, slots) turn so many tokens that it counts; compiled graphs fuse by themselves."""
    return like.shape[-2] >= MANY and not torch.compiler.is_compiling()


def unturned(like: torch.Tensor) -> tuple[Ones, Zeros]:
    """Cosines and sines of the shape, dtype and device of others."""
    return torch.ones_like(like).as_subclass(Ones), torch.zeros_like(like).as_subclass(Zeros)


def _leaves_its_form(constant: torch.Tensor, states: Any) -> bool:
    """Whether states have the shape and dtype of their product or sum with a constant."""
    if not isinstance(states, torch.Tensor) or isinstance(states, Unturned) or states.ndim < constant.ndim:
        return False
    sizes = zip(constant.shape[::-1], states.shape[::-1], strict=False)
    return torch.result_type(states, constant) == states.dtype and all(one in (1, size) for one, size in sizes)
