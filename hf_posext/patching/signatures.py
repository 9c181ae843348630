"""Names that differ between versions of transformers, read from the installed code.

transformers 5.24 renamed `past_key_values` and `cache_params` to `cache`, in arguments and in outputs. The old names
warn until 5.40. The functions of this module find the name that a forward accepts and the field that an output
contains, so that no other module spells one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

CACHE_NAMES = ("cache", "past_key_values", "cache_params")
"""Names of the cache in transformers, the newest first."""


def cache_argument(forward: Callable[..., Any]) -> str | None:
    """Return the name of the argument that takes the cache.

    Args:
        forward (`Callable`): forward of a model or of a layer, bound or not. Decorators of transformers and hooks of
            accelerate are looked through.

    Returns:
        `str` or `None`: `None` where nothing goes from one forward to the next. The `cache` of XLM and FlauBERT is a
        `dict` of one forward, and counts as none.
    """
    parameters = inspect.signature(forward).parameters
    names = (name for name in CACHE_NAMES if name in parameters)
    return next((name for name in names if "dict" not in str(parameters[name].annotation)), None)


def cache_of(output: Any) -> Any:
    """Return the cache that a model's output contains, `None` without one.

    Args:
        output (`ModelOutput`): as a forward returned it. In a plain tuple no cache is recognised.
    """
    # asking an output of 5.24 for an old name warns, so the old names are looked up among the fields that it lists
    fields = set(output) if isinstance(output, Mapping) else set()
    return next((output[name] for name in CACHE_NAMES if name in fields), None)


def with_cache(forward: Callable[..., Any], cache: Any) -> dict[str, Any]:
    """Return the keyword arguments that hand a cache to a forward.

    Args:
        forward (`Callable`): forward of a model.
        cache (`Cache`, *optional*): `None` gives no arguments.

    Raises:
        TypeError: the forward takes no cache.
    """
    if cache is None:
        return {}
    name = cache_argument(forward)
    if name is None:
        raise TypeError(f"{getattr(forward, '__qualname__', forward)} takes no cache")
    return {name: cache}
