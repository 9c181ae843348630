"""Remapping under transformers' continuous batching: `model.generate_batch`, and the server of `transformers serve`.

A step of continuous batching packs tokens of many requests into one row and stores their keys in pages. The paged
cache returns the unrotated keys of all requests, one request after the other, ordered by position. Each request then
attends separately, at its own positions, like in a forward of its own.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.cache import PagedAttentionCache

from ...errors import UnsupportedModelError
from ..undo import Mixin
from .forward import Positions
from .layout import Remapping


class ServesBatches(Mixin):
    """Mixin for the class of a remapped model, with continuous batching that uses the attention of the patch."""

    _posext_remapping: Remapping

    @torch.no_grad()
    def init_continuous_batching(
        self,
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        **kwargs: Any,
    ) -> ContinuousBatchingManager:
        """Create a manager like the unpatched model does. `generate_batch` and `transformers serve` call this.

        Raises:
            UnsupportedModelError: positions depend on the length of a text, or transformers is too old.
        """
        method = self._posext_remapping.plan.method
        if self._posext_remapping.plan.follows_rows:
            raise UnsupportedModelError(
                f"{method} follows the length of a text, and continuous batching reads a prompt in pieces whose sizes "
                "depend on other requests. Call model.generate, or patch with a method of fixed positions (rerope)."
            )
        if "kwargs" not in inspect.signature(PagedAttentionCache.update).parameters:
            raise UnsupportedModelError(
                f"{method} under continuous batching needs transformers 5.23. Install it, or call model.generate."
            )
        cached = getattr(self, "_cached_continuous_batching_manager", None)
        if isinstance(cached, ContinuousBatchingManager):
            return cached
        default: Any = self.generation_config
        generation_config = generation_config or default
        if generation_config.eos_token_id is None:
            generation_config.eos_token_id = -1  # like transformers: no end-of-sequence token
        return _Manager(
            model=self,
            generation_config=generation_config,
            continuous_batching_config=continuous_batching_config or ContinuousBatchingConfig(),
            **kwargs,
        )


class _Manager(ContinuousBatchingManager):  # type: ignore[misc]
    """Manager that keeps the attention of the patch, which the base class would replace by one from a fixed list."""

    def switch_to_cb_friendly_attn(self, model: Any, auto_switch_to_flash: bool = True) -> None:
        pass


@dataclass(frozen=True)
class Request:
    """Request in a step of continuous batching."""

    queries: slice  # tokens of the request in the row
    keys: slice  # keys of the request in the row
    place: Positions | None  # positions of its tokens and keys; `None` in a layer that does not rotate
    mask: torch.Tensor | None  # (1, 1, tokens, keys); `None` if the causal default is right


def requests_of(
    module: nn.Module, base: str, place: Positions | None, query: torch.Tensor, kwargs: dict[str, Any]
) -> list[Request]:
    """Return the requests of a step. A request has all keys up to its newest token, or those in a sliding window.

    The positions and queries (1, heads, tokens, dim) are those of the whole row. `kwargs` are the arguments of the
    attention function, after the paged cache has updated them.

    Raises:
        UnsupportedModelError: keys are missing from the pages of a layer without a sliding window.
    """
    tokens_end, keys_end = (kwargs[name].tolist() for name in ("cu_seq_lens_q", "cu_seq_lens_k"))
    window, requests = kwargs.get("sliding_window"), []
    for i, (first, start) in enumerate(zip(tokens_end[:-1], keys_end[:-1], strict=True)):
        queries, keys = slice(first, tokens_end[i + 1]), slice(start, keys_end[i + 1])
        tokens, count = queries.stop - first, keys.stop - start
        if not tokens:
            continue  # padding in the list of requests
        positions_of_request = place
        if place is not None:
            positions = place.query_axes[..., queries]
            key_positions = positions[..., :1] + torch.arange(tokens - count, tokens, device=positions.device)
            aligned = not key_positions.flatten()[0]
            if not aligned and window is None:
                raise UnsupportedModelError(not_paged(module, "does not use the sliding window of its config"))
            positions_of_request = replace(
                place, query_axes=positions, key_axes=key_positions, aligned=aligned, regular=True, memo={}
            )
        requests.append(Request(queries, keys, positions_of_request, _mask(base, query, tokens, count, window)))
    return requests


def not_paged(module: nn.Module, reason: str) -> str:
    """Return the error message for a layer that continuous batching does not support."""
    return f"{type(module).__name__} {reason}, so that continuous batching would be wrong. Call model.generate."


def _mask(base: str, query: torch.Tensor, tokens: int, keys: int, window: int | None) -> torch.Tensor | None:
    dropped = window is not None and keys > window
    if not dropped and (tokens == 1 or base == "sdpa" and tokens == keys):
        return None
    index = torch.arange(keys, device=query.device)
    distance = index[-tokens:, None] - index
    visible = ((distance >= 0) & (distance < (window or keys)))[None, None]
    if base == "sdpa":
        return visible
    return torch.zeros_like(visible, dtype=query.dtype).masked_fill(~visible, torch.finfo(query.dtype).min)
