"""Positions and attention scores of a live model in numbers, read-only."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError
from ..plan import BucketPlan, PositionMap
from .detect import rotary_sites, text_config
from .kernels.bands import mapped
from .modes import cache_of, evaluation_mode, switched_attention, with_cache
from .sites import bias_table, bucket_function, bucket_modules, first_row, position_tables, sinusoids, text_modules
from .tables import radians, sines

OWN_ROWS = 2**14
"""Sines that a model is asked to make at once: 128 MB where they are 2048 wide."""

_SOFTMAXES = (F.softmax, torch.softmax, torch.Tensor.softmax, torch.special.softmax)


def table_rows(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the learned tables by path, without the rows before position 0, float32 on the CPU.

    Raises:
        UnsupportedModelError: the model is on the meta device.
    """
    rows = {}
    for path, module in position_tables(model).items():
        if module.weight.is_meta:
            raise UnsupportedModelError(f"Expected {path} in memory, got the meta device. Load its weights first.")
        rows[path] = module.weight.detach()[first_row(model, path, module) or 0 :].float().cpu()
    return rows


def frequencies_in_force(model: PreTrainedModel, length: int) -> dict[str, torch.Tensor]:
    """Return the radians per token of each set of rotary frequencies for an input of `length` tokens.

    Rope types that follow the length keep what the last input gave them; a copy of the module is asked here.
    """
    by_set: dict[str, torch.Tensor] = {}
    for site in rotary_sites(model):
        if site.name in by_set:
            continue
        if getattr(site.module, f"{site.prefix}inv_freq").is_meta:
            raise UnsupportedModelError(
                f"Expected {site.path} in memory, got the meta device. Load its weights first."
            )
        twin = replace(site, module=copy.deepcopy(site.module))
        twin.run(torch.tensor([0, length - 1]))
        frequencies: torch.Tensor = getattr(twin.module, f"{site.prefix}inv_freq")
        by_set[site.name] = frequencies.detach().float().cpu()
    return by_set


def attends_both_ways(model: PreTrainedModel) -> bool:
    """Return whether some self-attention of the text part sees later tokens, as in an encoder."""
    modules = model.named_modules() if model.config.is_encoder_decoder else text_modules(model)
    attentions = (module for _, module in modules if "Attention" in type(module).__name__)
    return any(
        getattr(module, "is_causal", True) is False and "Cross" not in type(module).__name__ for module in attentions
    )


def slope_scale(model: PreTrainedModel) -> float:
    """Return the factor of ALiBi's slopes before the softmax: Falcon divides its biases with the scores."""
    config = text_config(model.config)
    return 1 / math.sqrt(config.hidden_size // config.num_attention_heads) if config.model_type == "falcon" else 1.0


def buckets_of(model: PreTrainedModel, distances: torch.Tensor, plan: BucketPlan) -> torch.Tensor:
    """Return the buckets of keys `distances` tokens before the query, int64 of the same shape.

    The plan is applied to distances first. `BucketPlan()` changes nothing.
    """
    module: Any = next(iter(bucket_modules(model).values()))
    name = bucket_function(module)
    if name is None:
        raise UnsupportedModelError(
            f"Expected buckets of one kind of distance, got several in {type(model).__name__}."
        )
    sort = getattr(module, name)
    known = {
        "bidirectional": not getattr(module, "is_decoder", False),
        "num_buckets": bias_table(module).num_embeddings,
        "max_distance": plan.max_distance or getattr(module, "relative_attention_max_distance", None),
    }
    taken = inspect.signature(sort).parameters
    arguments = {key: value for key, value in known.items() if key in taken and value is not None}
    out: torch.Tensor = sort(-torch.ceil(distances / plan.factor).long(), **arguments)
    return out


def bucket_biases(model: PreTrainedModel) -> torch.Tensor:
    """Return the learned bias of each bucket and head, float32 of shape `(buckets, heads)`."""
    module = next(iter(bucket_modules(model).values()))
    return bias_table(module).weight.detach().float().cpu()


def sinusoid_rows(model: PreTrainedModel, positions: torch.Tensor, rule: PositionMap | None = None) -> torch.Tensor:
    """Return the model's sines at positions, float32 of shape `(positions, width)`; NaN past the end of its table.

    A table that the model makes longer by itself has no end, so that these are computed where they are asked for; of
    one that follows no formula known here (MusicGen's cosines come first) the model makes the first `OWN_ROWS`.

    Args:
        model (`PreTrainedModel`): with sinusoids, without a patch.
        positions (`torch.LongTensor` of shape `(positions,)`): tokens counted from 0.
        rule (`PositionMap`, *optional*): as a plan moves them; then no table ends, and the sines must follow a known
            formula.
    """
    path, module = next(iter(sinusoids(model).items()))
    table: Any = module.weight if isinstance(module, nn.Embedding) else module.weights
    first: int = getattr(module, "offset", 0)
    if rule is not None or not isinstance(module, nn.Embedding):
        try:
            frequencies = radians(table, f"{path} of {model.config.model_type}")
        except UnsupportedModelError:
            if rule is not None:
                raise
            table = _made_rows(module, min(int(positions.max()) + 1, OWN_ROWS) + first)[first:]
        else:
            return sines(first + mapped(positions, rule or PositionMap()).double(), frequencies).float()
    held = table.detach().float().cpu()[positions.clamp(max=len(table) - 1)]
    rows: torch.Tensor = held.masked_fill(positions[:, None] >= len(table), torch.nan)
    return rows


def _made_rows(module: Any, count: int) -> torch.Tensor:
    taken = inspect.signature(module.get_embedding).parameters
    extra = {"padding_idx": getattr(module, "padding_idx", None)} if "padding_idx" in taken else {}
    rows: torch.Tensor = module.get_embedding(count, module.weights.shape[1], **extra)
    return rows


class _Watch(TorchFunctionMode):
    """Recorder of the last query's scores in every attention layer, in order.

    With eager attention every family computes scores of shape `(batch, heads, queries, keys)` and hands them to a
    softmax. That call is watched; no module is looked up.
    """

    def __init__(self, queries: int) -> None:
        super().__init__()
        self.queries = queries
        self.seen: list[torch.Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _SOFTMAXES and args[0].ndim == 4 and args[0].shape[2] == self.queries <= args[0].shape[3]:
            self.seen.append(args[0][0, :, -1].float())
        return func(*args, **(kwargs or {}))


@torch.inference_mode()
def last_query_scores(
    model: PreTrainedModel, input_ids: torch.Tensor, chunk: int
) -> Iterator[tuple[int, list[torch.Tensor]]]:
    """Return the scores before the softmax of the last token of each chunk of a text.

    The chunks go through with a cache, so that no square of the length of the text is ever held.

    Args:
        model (`PreTrainedModel`): causal, with a key-value cache, and without a patch.
        input_ids (`torch.LongTensor` of shape `(length,)`): one text.
        chunk (`int`): tokens; 2 or more.

    Yields:
        `tuple[int, list[torch.Tensor]]`: the position of the token, and for each layer float32 scores of shape
        `(heads, keys)`, masked ones among them.
    """
    config = text_config(model.config)
    if config.model_type == "falcon" and config.alibi:
        raise UnsupportedModelError(
            "Expected attention scores, got those of falcon, whose eager attention adds ALiBi's biases twice."
        )
    trunk, cache = model.base_model, None
    with switched_attention(model, "eager"), evaluation_mode(model):
        for begin in range(0, len(input_ids) - chunk + 1, chunk):
            with _Watch(chunk) as watch:
                out = trunk(input_ids[None, begin : begin + chunk], use_cache=True, **with_cache(trunk.forward, cache))
            cache = cache_of(out)
            if cache is None or not watch.seen:
                what = "a cache of keys" if cache is None else "attention scores that reach a softmax"
                raise UnsupportedModelError(f"Expected {what}, got none from {type(model).__name__}.")
            yield begin + chunk - 1, watch.seen
