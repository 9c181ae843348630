"""A skeleton of a model: the same classes, narrow and with weights of our own.

How an attention layer rotates follows from its code and its config. The weights of a real model may hide it (a pruned
row of a projection, a norm with factors of 0, biases in the hundreds, four-bit blocks of zeros), and one forward of it
takes seconds. So it is the skeleton that is asked. Of the real model only what weights can change is looked at.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..detect import text_config

VOCABULARY, INNER, HEADS = 64, 32, 2
"""Sizes of a narrow skeleton: token ids, channels inside of feed-forward layers, key heads."""

LARGEST, NARROW, EXPERTS = 150_000_000, 1024, 16
"""Weights of a skeleton at most; width of those that are small in any case; experts."""

INNER_NAMES = ("intermediate", "ffn", "n_inner", "d_ff", "mlp_hidden")
"""Parts of the names that configs have for the size inside of feed-forward layers."""

FINITE = (0.5, 1.5)
"""Range of weights of norms: away from 0, and none of them 1, so that a norm behind the rotation shows."""


def skeleton_of(model: PreTrainedModel) -> PreTrainedModel | None:
    """
    Return a skeleton of a model on the CPU in float32, in evaluation mode.

    Args:
        model (`PreTrainedModel`): the backbone of a model, on any device, with any weights.

    Returns:
        `PreTrainedModel` or `None`: its modules have the paths and classes of the model's. `None` where no such one
        can be built: its code cannot be called with a config alone, or somebody has changed the modules.
    """
    for smaller in (_narrowest, _narrowed, _shortened):
        try:
            config = smaller(model.config)
            if not _is_small(type(model), config):
                continue
            with torch.random.fork_rng(devices=[]), torch.device("cpu"):
                skeleton = type(model)(config).float().eval()
        except Exception:  # model code raises all kinds of errors at sizes that it does not expect
            continue
        if _alike(skeleton, model):
            _fill(skeleton)
            return skeleton
    return None


def _is_small(cls: type[PreTrainedModel], config: PreTrainedConfig) -> bool:
    """Return whether a skeleton takes little time and memory. Models of one width and without experts do once they are
    narrow; all others are counted on the meta device."""
    known = vars(config)
    if known.get("hidden_size", LARGEST) <= NARROW and not any("experts" in name for name in known):
        return True
    with torch.device("meta"):
        count: int = sum(parameter.numel() for parameter in cls(copy.deepcopy(config)).parameters())
    return count <= LARGEST


def copy_norms(skeleton: PreTrainedModel, model: PreTrainedModel, paths: Iterator[str]) -> bool:
    """
    Give attention layers of a skeleton the one-dimensional weights of the model's.

    A norm behind the rotation weighs each channel, by which the rotation is told. All else is in front of it.

    Returns:
        `bool`: whether all of them could be copied.
    """
    for path in paths:
        real = dict(model.get_submodule(path).named_parameters())
        for name, own in skeleton.get_submodule(path).named_parameters():
            if own.ndim != 1 or name.endswith("bias"):
                continue
            if name not in real or real[name].shape != own.shape or real[name].is_meta:
                return False
            own.data.copy_(real[name].detach().float())
    return True


def _alike(skeleton: PreTrainedModel, model: PreTrainedModel) -> bool:
    """Return whether a model has the modules of its skeleton, and code of its classes alone.

    Linear maps, norms and embeddings may be others (quantised ones, with an adapter, of a faster kernel): they do not
    rotate. A module whose own `forward` was replaced is not known, except by accelerate, which calls what it replaced.
    """
    modules = dict(model.named_modules())
    for path, bone in skeleton.named_modules():
        module = modules.get(path)
        if module is None:
            return False
        leaf = not any(True for _ in bone.children())
        plain = getattr(type(module), "_posext_base", type(module))
        if plain is not type(bone) and not leaf:
            return False
        if path and "forward" in vars(module) and not hasattr(module, "_hf_hook"):
            return False
        if _head_sizes(module) != _head_sizes(bone):
            return False
    return True


def _head_sizes(module: nn.Module) -> dict[str, Any]:
    """Sizes of a module that have a part in how it rotates: those of heads, and of frequencies."""
    sizes: dict[str, Any] = {
        name: value
        for name, value in vars(module).items()
        if type(value) is int and ("head" in name or "rot" in name) and ("dim" in name or "size" in name)
    }
    frequencies = (*module._buffers.items(), *vars(module).items())
    sizes |= {name: one.shape for name, one in frequencies if name.endswith("inv_freq") and hasattr(one, "shape")}
    return sizes


def _narrowest(config: PreTrainedConfig) -> PreTrainedConfig:
    """A config with few heads of the same width on a stream of a few channels, where the width is told by itself."""
    narrow: Any = _narrowed(config)
    if vars(narrow).get("head_dim") and vars(narrow).get("hidden_size", 0) > VOCABULARY:
        _rewidened(narrow, narrow.hidden_size, VOCABULARY)
    return narrow


def _narrowed(config: PreTrainedConfig) -> PreTrainedConfig:
    """A config with few heads of the same width; with all there are where the config does not tell their number."""
    narrow: Any = _shortened(config)
    known = vars(narrow)  # a config with widths by layer raises where it is asked for one of them
    heads, width = known.get("num_attention_heads"), known.get("hidden_size")
    if not isinstance(heads, int) or not isinstance(width, int) or heads < 1:
        return narrow
    key_heads = known.get("num_key_value_heads")
    key_heads = key_heads if isinstance(key_heads, int) and key_heads > 0 else heads
    kept = min(HEADS, key_heads)
    queries = kept * min(heads // key_heads, 2)
    less = (known.get("head_dim") or width // heads) * queries
    if less >= width:
        return narrow
    narrow.num_attention_heads = queries
    if "num_key_value_heads" in known:
        narrow.num_key_value_heads = kept
    _rewidened(narrow, width, less)
    return narrow


def _rewidened(config: Any, width: int, less: int) -> None:
    """All widths of the stream that layers read and write, under whatever name."""
    for name, value in list(vars(config).items()):
        is_width = any(part in name for part in ("hidden", "width", "embed", "size")) and "window" not in name
        if type(value) is int and value == width and is_width:
            setattr(config, name, less)


def _shortened(config: PreTrainedConfig) -> PreTrainedConfig:
    """A config with few tokens and small feed-forward layers: what has no part in attention."""
    short: Any = copy.deepcopy(config)
    short._attn_implementation_internal = text_config(config)._attn_implementation
    for name, value in list(vars(short).items()):
        if name.endswith("_token_id") or name in ("pad_index", "eos_index"):
            large = [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, int)]
            if any(one >= VOCABULARY for one in large):
                setattr(short, name, 0)
        elif type(value) is not int:
            continue
        elif "vocab" in name:
            setattr(short, name, min(value, VOCABULARY))
        elif name.endswith("experts") and not name.startswith("num_shared"):
            setattr(short, name, min(value, EXPERTS))
        elif any(part in name for part in INNER_NAMES):
            setattr(short, name, min(value, INNER))
    return short


def _fill(skeleton: nn.Module) -> None:
    """Weights of our own: each channel has some, and scores spread, so that attention depends on positions."""
    draw = torch.Generator("cpu").manual_seed(0)
    with torch.no_grad():
        for parameter in skeleton.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(*FINITE, generator=draw)
            else:
                parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=draw)
