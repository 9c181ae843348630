"""Attention scores of any model, for a few of its queries.

With eager attention every family computes scores of shape `(batch, heads, queries, keys)` and hands them to a softmax.
That call is watched; no module is looked up. The text goes through in chunks with a cache, so that no square of its
length is ever held.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError
from .detect import text_config
from .modes import evaluation_mode
from .signatures import cache_of, with_cache
from .switching import switched_attention

_SOFTMAXES = (F.softmax, torch.softmax, torch.Tensor.softmax, torch.special.softmax)


class _Watch(TorchFunctionMode):
    """Recorder of the last query's scores in every attention layer, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = 0
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

    Args:
        model (`PreTrainedModel`): causal, with a key-value cache, and without a patch.
        input_ids (`torch.LongTensor` of shape `(length,)`): one text.
        chunk (`int`): tokens; 2 or more.

    Yields:
        `tuple[int, list[torch.Tensor]]`: the position of the token, and for each layer float32 scores of shape
        `(heads, keys)`, masked ones among them.

    Raises:
        UnsupportedModelError: the model keeps no cache of keys, or its attention hands no scores to a softmax, or
            others than it has with sdpa.
    """
    config = text_config(model.config)
    if config.model_type == "falcon" and config.alibi:
        raise UnsupportedModelError(
            "the eager attention of falcon adds ALiBi's biases twice, so its attention cannot be watched"
        )
    trunk, cache = model.base_model, None
    with switched_attention(model, "eager"), evaluation_mode(model):
        for begin in range(0, len(input_ids) - chunk + 1, chunk):
            watch = _Watch()
            watch.queries = chunk
            with watch:
                out = trunk(input_ids[None, begin : begin + chunk], use_cache=True, **with_cache(trunk.forward, cache))
            cache = cache_of(out)
            if cache is None or not watch.seen:
                what = "keeps no cache of keys" if cache is None else "hands no attention scores to a softmax"
                raise UnsupportedModelError(f"{type(model).__name__} {what}, so its attention cannot be watched")
            yield begin + chunk - 1, watch.seen
