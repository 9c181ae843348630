"""State that a model keeps of the length of earlier inputs."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from .detect import rotary_sites


def forget_length(model: PreTrainedModel) -> None:
    """
    Put the dynamic NTK scaling of transformers into the state of a model that has read nothing.

    Its rotary modules keep the frequencies of the longest input so far, until one is shorter than the original length;
    what a text gives would depend on what was read before it.

    Args:
        model (`PreTrainedModel`): patched or not; one without such modules stays as it is.
    """
    for site in rotary_sites(model):
        module: Any = site.module
        rope_type = getattr(module, "rope_type", None)
        if "dynamic" not in str(rope_type[site.layer_type] if isinstance(rope_type, dict) else rope_type):
            continue
        if getattr(module, f"{site.prefix}max_seq_len_cached", 0) <= module.original_max_seq_len:
            continue
        own: Any = getattr(module, f"{site.prefix}inv_freq")
        original = getattr(module, f"{site.prefix}original_inv_freq").to(own.device, own.dtype)
        module.register_buffer(f"{site.prefix}inv_freq", original, persistent=False)
        setattr(module, f"{site.prefix}max_seq_len_cached", module.original_max_seq_len)
