"""Training on long rows: shifted sparse attention (S2), and checks that a model respects the positions of a row.

S2 trains at the cost of a short context, for dense attention afterwards: Chen et al., 2023: LongLoRA: Efficient
Fine-tuning of Long-Context Large Language Models, https://arxiv.org/abs/2309.12307. The reference code rolls half the
heads, so that the first half-group and the last attend as one, the beginning of a text to its end. Here each of them
is a group of its own, and nothing of the future is seen.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from ..errors import InvalidParameterError, UnsupportedModelError
from .detect import text_config
from .modes import evaluation_mode, replaced_attention
from .remap.attention import arguments_read
from .sites import makes_windows

HONOURED = {"dropout", "scaling", "is_causal", "sliding_window", "output_attentions", "cache"}
"""Arguments of sdpa attention that shifted attention honours."""

HALF = 8
"""Tokens in each half of the row that shows whether positions are respected."""


@contextmanager
def shifted_sparse_attention(model: PreTrainedModel, groups: int = 4) -> Iterator[None]:
    """
    Inside, a model in training mode attends within groups of tokens, half of its heads within groups that are shifted
    by half their size; in evaluation mode, and afterwards, it attends to everything. Layers with a sliding window do
    so in any case.

    Args:
        model (`PreTrainedModel`): a decoder with `sdpa` attention, without a patch that rotates late.
        groups (`int`, *optional*, defaults to 4): of a row, whose length must be a multiple of twice this number.

    Raises:
        InvalidParameterError: fewer than two groups.
        UnsupportedModelError: attention that cannot be replaced, or that needs what S2 does not support. The message
            names it.
    """
    if groups < 2:
        raise InvalidParameterError(
            f"Expected shifted to be 2 groups of a row or more, got {groups}. Pass shifted=4, as the paper has it."
        )
    config = text_config(model.config)
    base, name = config._attn_implementation, f"posext-shifted-{groups}"
    if base != "sdpa":
        raise UnsupportedModelError(
            f"{config.model_type} runs with {base!r} attention, and shifted sparse attention replaces 'sdpa' alone: "
            "model.set_attn_implementation('sdpa'), and a method that does not remap positions"
        )
    reached: list[str] = []

    def probe(module: nn.Module, query: Any, key: Any, value: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        _refuse(module, query, attention_mask, kwargs)
        reached.append(type(module).__name__)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    with replaced_attention(model, "posext-shifted-probe", probe), evaluation_mode(model), torch.no_grad():
        model(input_ids=torch.arange(3, 11, device=model.device)[None] % config.vocab_size, use_cache=False)
    if not reached:
        raise UnsupportedModelError(
            f"{config.model_type} does not send its attention through transformers' AttentionInterface; "
            "train it without shifted sparse attention"
        )
    with replaced_attention(model, name, partial(shifted_attention, groups=groups)):
        yield


def shifted_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    groups: int,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention function for `AttentionInterface`."""
    if not module.training or kwargs.get("sliding_window") is not None:
        dense: tuple[torch.Tensor, torch.Tensor | None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **kwargs
        )
        return dense
    length = query.shape[2]
    if attention_mask is not None or key.shape[2] != length or length % (2 * groups):
        raise InvalidParameterError(
            f"shifted sparse attention takes rows of one document, without padding, whose length is a multiple of "
            f"{2 * groups}; got {length} tokens" + (" with a mask" if attention_mask is not None else "")
        )
    repeats = query.shape[1] // key.shape[1]
    states = query, repeat_kv(key, repeats), repeat_kv(value, repeats)
    options = {"is_causal": True, "dropout_p": kwargs.get("dropout") or 0.0, "scale": kwargs.get("scaling")}
    size, heads = length // groups, query.shape[1] // 2
    plain = [state[:, : query.shape[1] - heads] for state in states]
    moved = [state[:, query.shape[1] - heads :] for state in states]
    cuts = (slice(None, size // 2), slice(size // 2, -size // 2), slice(-size // 2, None))
    pieces = [
        _within([state[:, :, cut] for state in moved], width, options)
        for cut, width in zip(cuts, (size // 2, size, size // 2), strict=True)
    ]
    out = torch.cat([_within(plain, size, options), torch.cat(pieces, 2)], 1)
    return out.transpose(1, 2).contiguous(), None


def _within(states: list[torch.Tensor], size: int, options: dict[str, Any]) -> torch.Tensor:
    """Return causal attention (batch, heads, tokens, dim) within groups of `size` tokens."""
    batch, heads, length, _ = states[0].shape
    query, key, value = (
        state.reshape(batch, heads, length // size, size, -1).transpose(1, 2).flatten(0, 1) for state in states
    )
    out: torch.Tensor = scaled_dot_product_attention(query, key, value, **options)
    return out.view(batch, length // size, heads, size, -1).transpose(1, 2).reshape(batch, heads, length, -1)


def _refuse(module: nn.Module, query: torch.Tensor, mask: torch.Tensor | None, given: dict[str, Any]) -> None:
    counts = arguments_read(sdpa_attention_forward) - HONOURED | {"s_aux"}
    unknown = sorted(name for name, value in given.items() if value is not None and name in counts)
    window = given.get("sliding_window")
    if mask is not None and window is None:
        unknown.append("a mask where all of a text is seen")
    if unknown:
        raise UnsupportedModelError(
            f"{type(module).__name__} asks its attention for {', '.join(unknown)}, which shifted sparse attention "
            "cannot honour; train without it"
        )
    if window is not None and not makes_windows(module):
        raise UnsupportedModelError(
            f"Expected masks of the sliding window of {type(module).__name__}, got none: it asks its attention for "
            f"{window} tokens, and with sdpa sees all. Load the model with sliding_window=None to train it in groups."
        )
    if query.shape[1] < 2:
        raise UnsupportedModelError(f"{type(module).__name__} has one head, and half of them are to be shifted")


def check_packing(model: PreTrainedModel) -> None:
    """Refuse a model that attends across documents in one row, where only positions that begin anew tell them apart.

    Raises:
        UnsupportedModelError: it takes no positions, or what one document says changes what the next one gives.
    """
    positions = torch.arange(HALF).repeat(2)
    first, second = _logits(model, positions, None)[:, HALF:]
    if not torch.equal(first, second):
        raise UnsupportedModelError(
            f"{type(model).__name__} reads across the documents of a packed row. Leave out pack, so that each row is "
            "of one document"
        )


def check_skipping(model: PreTrainedModel) -> None:
    """Refuse a model that takes no notice of a jump in its positions, or takes it for the border of two documents.

    Raises:
        UnsupportedModelError: it does.
    """
    near, far = torch.arange(2 * HALF), torch.arange(2 * HALF)
    far[HALF:] += HALF
    whole, jump = (_logits(model, positions, torch.ones(2, 2 * HALF)) for positions in (near, far))
    if torch.equal(whole[:, HALF:], jump[:, HALF:]):
        raise UnsupportedModelError(
            f"{type(model).__name__} takes no notice of position_ids, so positions cannot be skipped. Leave out pose."
        )
    if torch.equal(*jump[:, HALF:]):
        raise UnsupportedModelError(
            f"{type(model).__name__} takes a jump in its positions for another document. Leave out pose."
        )


def _logits(model: PreTrainedModel, positions: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return the logits of two rows that differ only in their first half."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise UnsupportedModelError(
            f"{type(model).__name__} takes no position_ids, which pack and pose depend on. Leave both out."
        )
    vocabulary = text_config(model.config).vocab_size
    ids = (torch.arange(4 * HALF).view(2, 2 * HALF) + 3) % vocabulary
    ids[1, HALF:] = ids[0, HALF:]
    given = {"input_ids": ids, "position_ids": positions.expand(2, -1), "attention_mask": mask}
    with evaluation_mode(model), torch.no_grad():
        placed = {name: None if value is None else value.to(model.device) for name, value in given.items()}
        logits: torch.Tensor = model(**placed, use_cache=False)[0]
    return logits
