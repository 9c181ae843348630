"""Rotates late: queries and keys reach the attention function unrotated.

Rotary modules return the identity (cosine 1, sine 0); a function in transformers' `AttentionInterface` rotates with
the positions that the plan wants for each pair, then attends. No model's forward is copied. In a step of decoding
whose cached keys stand turned, the model turns for the nearest pairs, and the function only what differs
(`decoding_step.py`). Where an indexer selects keys by their rotated states (DeepSeek's sparse attention), the model
rotates as ever and the function turns by the difference.
"""

from __future__ import annotations

import functools
import math
import sys
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from ...errors import EvaluationError, UnsupportedModelError
from ...plan import Part, PositionMap, QueryScale
from ..kernels import Branch, banded_attention, mapped
from ..switching import forget_attention, register_attention
from .decoding_step import step_queries, whole_step
from .layout import Layout, Phases
from .rotated_keys import turned_keys

if TYPE_CHECKING:
    from .positions import Positions
    from .state import LateRotation

MASKS = {"posext-sdpa": sdpa_mask, "posext-eager": eager_mask}
"""Names under which the attention function is registered, by the masks that the model shall build for it."""

SAME = PositionMap()

UNPROVEN_ON = "cuda"
"""Where a text attends outside of compiled graphs, if parts are chunks: on an H100 and an H200, torch 2.11 fused the
biases of three parts and their softmax into one kernel that was wrong, though each alone is right. Steps of decoding
compute no such thing, and their graphs are right there (`tests/test_gpu.py`)."""

HARMLESS = frozenset(
    "position_ids cache_position use_cache output_attentions output_hidden_states return_dict is_causal scaling "
    "dropout softcap s_aux sliding_window position_embeddings past_key_values num_items_in_batch cu_seq_lens_q "
    "cu_seq_lens_k max_length_q max_length_k output_router_logits logits_to_keep".split()
)
"""Arguments of attention functions that `banded_attention` honours, or that do not change what is attended."""


def late_attention(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The function in `AttentionInterface`: rotate as the plan says, then attend."""
    late: LateRotation | None = getattr(module, "_posext_late", None)
    if late is None:
        raise EvaluationError(f"{type(module).__name__} was made after the patch; undo the patch, then patch again")
    text = torch.compiler.is_compiling() and args[0].shape[2] > 1
    if text and args[0].device.type == UNPROVEN_ON and any(part.chunk > 1 for part in late.plan.parts):
        found: tuple[torch.Tensor, torch.Tensor | None] = _outside_of_graphs(late, module, *args, **kwargs)
        return found
    return _late_attention(late, module, *args, **kwargs)


def _late_attention(
    late: LateRotation,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Layers that do not rotate, and sliding-window layers that see only the nearest part, attend as in the unpatched
    model."""
    path: str = module._posext_path  # type: ignore[assignment]
    if late.quarters is not None:
        late.captured[path] = (query.detach().cpu(), key.detach().cpu())
        return value.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None
    selected = kwargs.pop("indices", None)
    if selected is not None:
        assert attention_mask is not None  # the indexer has read it
        attention_mask = _only(attention_mask, selected)
    if path not in late.layers:
        return _base_attention(late, module, query, key, value, attention_mask, **kwargs)
    layout = late.layers[path] = late.layers[path].to(query.device)
    at = late.positions(layout.rotary)
    there = query.device
    at_query, at_key = at.once(("there", there), lambda: (at.queries.to(there), at.keys.to(there)))
    if at_key.shape[1] < key.shape[2] and not (query.shape[2] == 1 and torch.compiler.is_compiling()):
        # a static cache, filled in part: leave the rest out
        key, value = key[:, :, : at_key.shape[1]], value[:, :, : at_key.shape[1]]
        attention_mask = None if attention_mask is None else attention_mask[..., : at_key.shape[1]]
    # of a sliding cache the latest keys are left; a graph keeps the free slots of a static one, which are masked
    if at_key.shape[1] != key.shape[2]:
        at_key = at_key[:, -key.shape[2] :]
        at_key = nn.functional.pad(at_key, (0, key.shape[2] - at_key.shape[1]))

    parts = () if late.unmapped else late.plan.parts
    scale = None if late.unmapped else late.plan.query_scale
    if scale is not None and scale.first_layer > getattr(module, "layer_idx", 0):  # they are numbered: see probe.py
        scale = None
    window = kwargs.get("sliding_window")
    if not parts or (window is not None and _all_near(parts[0], window)):
        given, given_key = at_query, at_key
        if at.given.ndim == 3:  # the axes of a multimodal model; text has one position on all of them
            given = at.given.to(query.device)
            given_key = given if key.shape[2] == given.shape[-1] else at_key.expand(given.shape[0], -1, -1)
            turned = False
            late.loose.add(layout.rotary)
        else:
            key, turned, _ = turned_keys(late, module, layout, at, key, query.shape[2])
        if not at.turned:
            query = _turns(late, layout.query, at, query, "same", (SAME,), given)[0]
        query = _scaled(query, at_query, scale)
        if not turned:
            key = _turns(late, layout.key, at, key, "same", (SAME,), given_key)[0]
        return _base_attention(late, module, query, key, value, attention_mask, **kwargs)

    unknown = sorted(name for name, given in kwargs.items() if name not in HARMLESS and given is not None)
    if unknown:
        raise UnsupportedModelError(
            f"{type(module).__name__} asks its attention for {', '.join(unknown)}, which remapping cannot honour"
        )
    # not where a sliding cache has dropped keys; chunks are bands where rows begin at position 0, windows anywhere
    aligned = (
        at.slot is None
        and at_key.shape[1] == at.keys.shape[1]
        and (at.aligned or at.regular and all(map(_slides, parts)))
    )
    scaling = query.shape[-1] ** -0.5 if kwargs.get("scaling") is None else kwargs["scaling"]
    banded = (
        aligned and attention_mask is None and not any(kwargs.get(name) is not None for name in ("softcap", "s_aux"))
    )
    whole = at.turned and banded and not kwargs.get("dropout")
    step = whole_step(late, layout, at, query, key, value, scaling) if whole else None
    key, turned, last = turned_keys(late, module, layout, at, key, query.shape[2], leave=step is not None)
    if step is not None:
        return step(_scaled(query, at_query, scale), key, value, last), None
    (rules, which), (key_rules, which_key) = late.query_maps, late.key_maps
    if at.turned:
        queries = step_queries(late, layout.query, at, query)
    else:
        queries = _turns(late, layout.query, at, query, "query", rules, at_query)
    queries = [_scaled(one, at_query, scale) for one in queries]
    keys = None if turned else _turns(late, layout.key, at, key, "key", key_rules, at_key)
    branches = [
        Branch(part, queries[i], keys[j] if keys else key) for part, i, j in zip(parts, which, which_key, strict=True)
    ]
    out = banded_attention(
        branches,
        value,
        at_query,
        at_key,
        mask=attention_mask,
        aligned=aligned,
        scaling=scaling,
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
        dropout=kwargs.get("dropout") or 0.0,
    )
    if attention_mask is not None and attention_mask.dtype == torch.bool and at.slot is None:
        # as SDPA: 0 where a query attends to nothing. Recurrent Gemma's convolutions read such padding
        out = out.masked_fill(~attention_mask.any(-1).transpose(1, 2)[..., None], 0)
    return out, None


_outside_of_graphs: Any = torch.compiler.disable(_late_attention)  # type: ignore[no-untyped-call]


def _only(mask: torch.Tensor, selected: torch.Tensor) -> torch.Tensor:
    """A mask (batch, 1, queries, keys) less the keys that an indexer did not select (batch, queries, selected).

    Its own attention does so by itself only if that is called eager or sdpa.
    """
    batch, queries, _ = selected.shape
    chosen = torch.zeros(batch, 1, queries, mask.shape[-1], dtype=torch.bool, device=mask.device)
    chosen = chosen.scatter(-1, selected[:, None].long(), True)
    return mask & chosen if mask.dtype == torch.bool else mask.masked_fill(~chosen, torch.finfo(mask.dtype).min)


def _all_near(part: Part, window: int) -> bool:
    """Whether a sliding window holds only pairs of a part that leaves positions as they are."""
    unmoved = part.query == part.key == SAME
    return unmoved and part.chunk == 1 and (part.high is None or window <= part.high)


def _slides(part: Part) -> bool:
    """Whether a part is a window that moves on with each query."""
    return part.chunk == 1 and part.keys_below is None


def _turns(
    late: LateRotation,
    layout: Layout,
    at: Positions,
    states: torch.Tensor,
    what: str,
    rules: tuple[PositionMap, ...],
    positions: torch.Tensor,
) -> list[torch.Tensor]:
    """Queries or keys turned to their positions under each of the maps, which are the same wherever `what` is."""

    def phases(some: tuple[PositionMap, ...]) -> Phases:
        lengths = at.lengths(positions) if any(rule.row_group for rule in some) else None
        wanted = torch.cat([mapped(positions, rule, lengths) for rule in some], -1)
        if not late.delta:
            return layout.phases(*late.phases(at, wanted, states), states.dtype)
        site = late.sites[at.name]  # the model has turned by its own positions, and factor, already
        cos, sin = late.phases(at, wanted - torch.cat([positions] * len(some), -1), states)
        factor = getattr(site.module, f"{site.prefix}attention_scaling", 1.0)
        return layout.phases(cos / factor, sin / factor, states.dtype)

    step = positions.shape[-1] == 1  # it has many small operations: all maps at once
    turned = []
    for number, some in enumerate([rules] if step else [(rule,) for rule in rules]):
        kind = what, number, layout.kind, positions.shape, states.dtype, states.device
        turned.append(layout.rotate(states, at.once(kind, functools.partial(phases, some))))
    return list(turned[0].chunk(len(rules), 2)) if step else turned


def _scaled(query: torch.Tensor, positions: torch.Tensor, scale: QueryScale | None) -> torch.Tensor:
    """Queries (batch, heads, tokens, dim) that grow with their positions (batch, tokens)."""
    if scale is None:
        return query
    past = (positions.float() + 1) / scale.length
    if scale.step is None:
        factor = (1 + scale.temperature * past.clamp(min=1).log()).square() * scale.constant
    else:
        factor = (1 + scale.temperature * ((positions + 1) // scale.step + 1).float().log()) * scale.constant
    if scale.log:
        factor = factor * ((positions.float() + 1).log() / math.log(scale.length)).clamp(min=1)
    return query * factor.to(query.dtype)[:, None, :, None]


def _base_attention(
    late: LateRotation, module: nn.Module, query: Any, key: Any, value: Any, mask: torch.Tensor | None, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attention that the unpatched model would call."""
    if late.base == "sdpa":
        result: tuple[torch.Tensor, torch.Tensor | None] = sdpa_attention_forward(
            module, query, key, value, mask, **kwargs
        )
        return result
    homes = [sys.modules[cls.__module__] for cls in type(module).__mro__]
    eager = next(home.eager_attention_forward for home in homes if hasattr(home, "eager_attention_forward"))
    attended: tuple[torch.Tensor, torch.Tensor | None] = eager(module, query, key, value, mask, **kwargs)
    return attended


def lease(late: LateRotation) -> weakref.finalize[[], LateRotation]:
    """Put the attention function into transformers' registries, until what is returned is called or `late` is gone."""
    for name, mask in MASKS.items():
        register_attention(name, late_attention, mask)
    return weakref.finalize(late, _return_lease)


def _return_lease() -> None:
    for name in MASKS:
        forget_attention(name)
