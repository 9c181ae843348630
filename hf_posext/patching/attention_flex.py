"""Attention over parts by FlexAttention: any mask, softcap or positions, in one call for each part.

On the CPU it runs uncompiled, which holds all scores: good for tests alone. The block masks of its compiled form leave
out what a part does not attend to.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ..plan import Part
from .attention_bands import Merged


@functools.cache
def _compiled() -> tuple[Callable[..., Any], Callable[..., Any]]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention  # slow to import

    return torch.compile(flex_attention, dynamic=True), torch.compile(create_block_mask, dynamic=True)


def attend_flex(
    states: list[tuple[Part, torch.Tensor, torch.Tensor]],
    value: torch.Tensor,
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
    *,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """As `banded_attention`, without gradients: states are the parts with the queries and keys rotated for each."""
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    plain: tuple[Callable[..., Any], Callable[..., Any]] = flex_attention, create_block_mask
    attend, blocks = plain if value.device.type == "cpu" else _compiled()
    batch, heads, queries = states[0][1].shape[:3]
    keys = value.shape[2]
    at_query, at_key = query_positions.expand(batch, -1), key_positions.expand(batch, -1)
    given = None if mask is None else mask.expand(batch, -1, queries, -1)
    several = given is not None and given.shape[1] > 1

    def allowed(part: Part, b: Any, h: Any, i: Any, j: Any) -> Any:
        distance = at_query[b, i] // part.chunk - at_key[b, j] // part.chunk
        seen = distance >= part.low if part.low > 0 else distance == distance
        if part.high is not None:
            seen = seen & (distance < part.high)
        if part.keys_below is not None:
            seen = seen & (at_key[b, j] < part.keys_below)
        if given is None:
            return seen & (j <= i + keys - queries)
        return seen & given[b, h if several else 0, i, j] if given.dtype == torch.bool else seen

    def score(number: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        if softcap is not None:
            number = softcap * torch.tanh(number / softcap)
        if given is not None and given.dtype != torch.bool:
            number = number + given[b, h if several else 0, i, j]
        return number

    merged = Merged(states[0][1], value)
    for part, query, key in states:
        seen = blocks(functools.partial(allowed, part), batch, heads if several else None, queries, keys, value.device)
        out, aux = attend(
            query,
            key,
            value,
            score_mod=score,
            block_mask=seen,
            scale=scaling,
            enable_gqa=True,
            return_aux=AuxRequest(lse=True),
        )
        merged.add(slice(None), out, aux.lse)
    if sinks is not None:
        merged.add_sinks(sinks)
    return merged.out.transpose(1, 2).contiguous()
