"""Finds the layers in which numbers stop being finite."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
"""A part of a path that is a number."""

COMPUTED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Dtypes of weights that are looked at; quantised ones cannot hold what is not finite, or not be asked."""

DAMAGED = "weights that are not finite themselves"
"""Beginning of the name of a source that no dtype and no factor would change."""


class Scorer:
    """
    What scorers share: they remember how to find the layers in which numbers stopped being finite.

    Attributes:
        model (`PreTrainedModel`): without wrappers.
        culprit (`Callable`, *optional*): once a value was not finite: names the layers that the latest such came from.
    """

    model: Any
    culprit: Callable[[], str] | None = None

    def look_at(self, nll: torch.Tensor, run: Callable[[int], object]) -> None:
        """Remember what gave values that are not finite, if some are not.

        Args:
            nll (`torch.Tensor` of shape `(rows, ...)`): what was found.
            run (`Callable[[int], object]`): runs the model on one row again.
        """
        bad = (~torch.isfinite(nll)).flatten(1).any(1).nonzero()
        if len(bad):
            self.culprit = functools.partial(first_not_finite, self.model, functools.partial(run, int(bad[0])))


@torch.no_grad()
def first_not_finite(model: nn.Module, run: Callable[[], object]) -> str:
    """
    The family of the first module whose output is not finite.

    Layers of a stack are one family, as in `model.layers.*.mlp.down_proj (first in layer 3)`.

    Args:
        model (`torch.nn.Module`): with the patch that is in force.
        run (`Callable`): runs the model once more on what gave such values; its result is not looked at.
    """
    weights = ((name, weight) for name, weight in model.named_parameters() if weight.dtype in COMPUTED)
    damaged = next((name for name, weight in weights if not bool(torch.isfinite(weight).all())), None)
    if damaged is not None:
        return f"{DAMAGED}: {family(damaged)}"
    found: list[str] = []

    def look(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not found and not all(bool(torch.isfinite(tensor).all()) for tensor in _floating(output)):
                found.append(path)

        return hook

    handles = [module.register_forward_hook(look(path)) for path, module in model.named_modules()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return family(found[0]) if found else "no module when it was run again"


def family(path: str) -> str:
    """The name of all modules that differ from one in the number of their layer only, and that number."""
    numbers = _NUMBER.findall(path)
    if not numbers:
        return path or "what the model does after its head"
    return f"{_NUMBER.sub('*', path)} (first in layer {'.'.join(numbers)})"


def _floating(output: Any) -> Iterator[torch.Tensor]:
    """The tensors of floating point numbers in what a module gives."""
    if isinstance(output, torch.Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping | list | tuple):
        for part in output.values() if isinstance(output, Mapping) else output:
            yield from _floating(part)
