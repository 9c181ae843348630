"""Helpers for tests of attention over bands."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from hf_posext.patching import kernels
from hf_posext.patching.kernels import banded
from hf_posext.patching.kernels.bands import Geometry
from hf_posext.plan import Band


def attention_kernel(name: str) -> AbstractContextManager[Any]:
    """Force one form of attention inside the context: `"torch"`, `"cpu"` or `"plain"`."""
    return patch.object(kernels, "FORCED", name)


class Branch(NamedTuple):
    """Band with its queries (batch, heads, queries, dim) and keys (batch, key heads, keys, dim)."""

    band: Band
    query: torch.Tensor
    key: torch.Tensor


def banded_attention(
    branches: list[Branch],
    value: torch.Tensor,
    queries: torch.Tensor,
    keys: torch.Tensor,
    *,
    mask: torch.Tensor | None,
    aligned: bool,
    **options: Any,
) -> torch.Tensor:
    """Return attention over bands, with queries and keys at the given positions."""
    bands, *states = zip(*branches, strict=True)
    return banded.banded_attention(Geometry(bands, queries, keys, mask, aligned), *states, value, **options)
