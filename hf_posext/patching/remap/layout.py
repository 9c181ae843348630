"""Remapping of a patched model, and measurement of how each attention layer rotates its queries and keys.

A [`Remapping`] contains the plan and a [`Layer`] for each attention layer that rotates. Both are frozen, and all
forwards share them.

transformers has nineteen different functions that apply rotary phases. They rotate halves or interleaved channels, all
or part of a head. One permutes its output, one rotates in the opposite direction, one is followed by a weighted norm.
None of this code is inspected. Instead, one forward runs a few rows of the same five tokens, with the attention output
zeroed and every phase at 0 or 90 degrees. Each channel c of the queries and keys that reach the attention function is
`out_c = x_c cos[s] + g x_p sin[s]`. The forward shows its partner p, its signed weight g, and the slot s of the rotary
module's output that drives it.

The weights of a model may hide its layout (a pruned row of a projection, a norm with factors of 0, biases in the
hundreds, four-bit blocks of zeros), and a forward of a large model takes seconds. The forward is therefore that of a
skeleton: a narrow model of the same classes with random weights. Of the real model, only the weights that can change
the rotation are read.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ...plan import ExtensionPlan, Growth, QueryScale
from ..kernels import one_pass
from ..kernels.bands import Bands, visible

Captured = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Queries and keys (rows, heads, tokens, dim) that reached the attention function, by layer."""

Quarters = dict[str, torch.Tensor]
"""Quarter rotations, 0 or 1, for each row of a forward and each slot (rows, slots), by set of frequencies."""


class Probing:
    """Stand-in for a remapping while layouts are measured, with quarter rotations that replace the phases."""

    def __init__(self, quarters: Quarters) -> None:
        self.quarters = quarters
        self.captured: Captured = {}
        self.windows: dict[str, int | None] = {}  # number of tokens that each layer sees back, `None` if all

    def capture(
        self, path: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, None]:
        """Store queries and keys, and return zeros in place of the attention's output."""
        self.captured[path] = query.detach().cpu(), key.detach().cpu()
        self.windows[path] = None if mask is None else _window(mask[0, 0])
        return value.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None


def _window(mask: torch.Tensor) -> int | None:
    """Return the sliding window of a mask (tokens, tokens). `None` if the mask has another form or hides no token.

    The window is read from the mask instead of the layer's arguments, because OLMoE passes a window to its attention
    but attends to all tokens.
    """
    seen = visible(mask)
    window = int(seen[-1].sum())
    slides = window < len(seen) and torch.equal(seen, torch.ones_like(seen).tril().triu(1 - window))
    return window if slides else None


FEW = 8
"""Maximum number of tokens for which the partners of all channels are gathered at once, instead of by slices."""

TOLERANCE = 1e-5
"""Tolerance in float32, relative to the largest value. Probes are exact rotations by 0 or 90 degrees, so only a norm
after them rounds. In half precision, it rounds by up to one unit in the last place."""


Phases = tuple[torch.Tensor, torch.Tensor]
"""Cosine and signed sine (batch, 1, tokens, dim) for each channel of the queries or keys of one layout."""


@dataclass(frozen=True)
class Layout:
    """Rotation of the channels of queries or keys."""

    kind: int  # number of the layout; layouts of one kind are equal
    slots: torch.Tensor  # slot of the rotary module's output that drives each channel (dim,)
    partners: torch.Tensor  # channel with which each channel is mixed (dim,)
    weights: torch.Tensor  # signed weight of the partner, 0 for channels that do not rotate (dim,)
    direct: bool  # whether slots are the channels themselves, so that phases need no selection
    # channels and their partners as slices; `None` if two pairs of slices do not suffice
    swaps: tuple[tuple[slice, slice], ...] | None = field(init=False)
    whole: bool = field(init=False)  # whether all channels rotate

    def __post_init__(self) -> None:
        object.__setattr__(self, "swaps", _swaps(self.partners, self.weights))
        object.__setattr__(self, "whole", bool(self.weights.ne(0).all()))

    def phases(self, cos: torch.Tensor, sin: torch.Tensor, dtype: torch.dtype) -> Phases:
        """Return phases for [`~Layout.rotate`] in a dtype, given cosine and sine (batch, tokens, slots)."""
        weights = self.weights.to(sin.dtype)
        if not self.direct:
            cos, sin = cos.index_select(-1, self.slots), sin.index_select(-1, self.slots)
        if not self.whole:
            cos = torch.where(weights == 0, 1.0, cos)
        return cos.unsqueeze(1).to(dtype), (sin * weights).unsqueeze(1).to(dtype)

    def rotate(self, states: torch.Tensor, phases: Phases) -> torch.Tensor:
        """Return queries or keys (batch, heads, tokens, dim) rotated by phases.

        Phases belong to the tokens. A single token may also have several phases, and is then rotated by each of them.
        """
        cos, sin = phases
        if self.swaps is None or states.shape[2] <= FEW:
            return (states * cos).add_(states.index_select(-1, self.partners) * sin)  # rounds like models do
        first, second = self.swaps[0]
        fused = one_pass(states) if first.stop == second.start else None
        if fused is not None:
            return fused.rotate(states, cos, sin, first.stop)  # type: ignore[no-any-return]
        rotated = states * cos
        for here, there in self.swaps:  # in place, to avoid a copy of all partners
            rotated[..., here].add_(states[..., there] * sin[..., here])
        return rotated

    def rotate_(self, states: torch.Tensor, phases: Phases) -> None:
        """Rotate a few tokens in place."""
        cos, sin = phases
        partners = states.index_select(-1, self.partners)
        states.mul_(cos).addcmul_(partners, sin)

    def is_rotation(self) -> bool:
        """Return whether opposite phases undo a rotation: partners are mutual and have opposite weights."""
        mutual = self.partners[self.partners] == torch.arange(len(self.partners), device=self.partners.device)
        # wide enough for weights that were measured in half precision
        opposite = (self.weights * self.weights[self.partners] + 1).abs() < 1e-2
        return bool(((mutual & opposite) | (self.weights == 0)).all())

    def to(self, device: torch.device) -> Layout:
        """Return a copy on a device."""
        copied = copy.copy(self)
        for name in ("slots", "partners", "weights"):
            object.__setattr__(copied, name, getattr(self, name).to(device))
        return copied


@dataclass(frozen=True)
class Layer:
    """Attention layer that rotates. Stored on the layer's module when a model is patched."""

    rotary: str  # set of frequencies
    query: Layout
    key: Layout
    window: int | None = None  # number of tokens that the layer's masks let it see back
    near: bool = False  # whether all pairs within the window are at the positions of the model
    scale: QueryScale | None = None  # scale of the queries
    base: Any = None  # attention function of the unpatched module
    index: Any = None  # index of the layer in the cache, `None` without one
    _copies: dict[torch.device, Layer] = field(default_factory=dict, init=False, repr=False, compare=False)

    def is_plain(self) -> bool:
        """Return whether channels are mixed by plain rotations, with all weights 1, 0, or -1."""
        return all(bool((side.weights.abs().round() == side.weights.abs()).all()) for side in (self.query, self.key))

    def on(self, device: torch.device) -> Layer:
        """Return the layer with its layouts on a device. A copy is kept for each device."""
        layer = self._copies.get(device)
        if layer is None:
            layer = replace(self, query=self.query.to(device), key=self.key.to(device))
            self._copies[device] = layer
        return layer


@dataclass(frozen=True)
class Remapping:
    """Remapping of positions in a patched model.

    It contains no state of a forward or a thread. Copies and pickles of the model have their own.
    """

    plan: ExtensionPlan
    base: str  # attention implementation of the unpatched model, "sdpa" or "eager"
    layers: dict[str, Layer] = field(default_factory=dict)  # attention layers that rotate, by path
    # Whether the model rotates by its own positions and attention adds the difference. Used if an indexer reads
    # rotated states (DeepSeek's sparse attention).
    delta: bool = False
    # Whether keys may stay rotated in the cache: the plan rotates at most one cached key per step, rotations are
    # invertible, and nothing else in the model reads the cached keys.
    rotates_cached_keys: bool = False
    # arguments that the unpatched attention reads and attention over bands does not support
    refused: frozenset[str] = frozenset()
    bands: Bands = field(init=False)  # empty for a plan that only scales queries or follows the length of rows
    growths: dict[str, Growth] = field(init=False)  # by set of frequencies
    _copies: dict[Any, torch.Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        growths = {entry.name: entry.growth for entry in self.plan.rotaries if entry.growth is not None}
        object.__setattr__(self, "bands", Bands(self.plan.bands))
        object.__setattr__(self, "growths", growths)
        for name, growth in growths.items():
            numbers = (growth.moving, growth.power, growth.kept)
            self._copies[name] = torch.tensor(numbers, dtype=torch.float32, device="cpu")

    def growth(self, name: str, device: torch.device) -> torch.Tensor:
        """Return `moving`, `power` and `kept` of [`Growth`] as float32 (3, slots) on a device.

        A copy is kept for each device, because the host would have to wait for a transfer in every forward.
        """
        numbers = self._copies.get((name, device))
        if numbers is None:
            numbers = self._copies[name, device] = self._copies[name].to(device)
        return numbers


class UnknownLayout(Exception):
    """Error for a layer whose queries and keys do not rotate by rotary phases."""


def measure(forward: Callable[[Quarters], Captured], pairs: dict[str, torch.Tensor]) -> dict[str, Layer]:
    """Return the layers that rotate, with their layouts, by path.

    `forward` runs the model with quarter rotations in place of phases, on as many equal rows, and returns the queries
    and keys that reached attention. `pairs` contains the pair of each slot, by set of frequencies. Slots of one pair
    have the same phase.

    Raises:
        UnknownLayout: a layer has no layout. The message names the layer.
    """
    # number the pairs of all sets from 1 on: the code of a slot is the number of its pair
    codes, first = {}, 1
    for name in pairs:
        codes[name] = pairs[name] + first
        first += int(pairs[name].max()) + 1
    count = max(first - 1, 1).bit_length()

    def rows(code: torch.Tensor) -> torch.Tensor:
        """Return rows without rotation, with all slots rotated, and one for each binary digit of the slots' codes."""
        digits = [code >> bit & 1 for bit in range(count)]
        return torch.stack([torch.zeros_like(code), torch.ones_like(code), *digits])

    captured = forward({name: rows(code) for name, code in codes.items()})
    layers: dict[str, Layer] = {}
    kinds: dict[Any, Layout] = {}
    for layer, states in captured.items():
        sides = [_layout(layer, side[0], side[1], side[2:]) for side in states]
        if not any(bool(rotates.any()) for _, _, rotates, _ in sides):
            continue
        # all codes of a layer must belong to a single set of frequencies
        code = torch.cat([code[rotates] for _, _, rotates, code in sides])
        sets = [name for name in codes if bool(torch.isin(code, codes[name]).any())]
        if len(sets) != 1 or not bool(torch.isin(code, codes[sets[0]]).all()):
            raise UnknownLayout(f"{layer} is rotated by {len(sets)} sets of frequencies")
        set_codes = codes[sets[0]]
        slot_of = {int(c): slot for slot, c in reversed(list(enumerate(set_codes.tolist())))}
        layouts = []
        for partners, weights, _, code in sides:
            # most modules have a slot for each channel; otherwise, any slot of the channel's pair is right
            direct = torch.equal(set_codes, code)
            slots = torch.arange(len(code)) if direct else torch.tensor([slot_of.get(int(c), 0) for c in code])
            numbers = tuple(tuple(each.tolist()) for each in (slots, partners, weights))
            layout = Layout(len(kinds), slots, partners, weights, direct)
            layouts.append(kinds.setdefault(numbers, layout))
        query, key = layouts
        layers[layer] = Layer(sets[0], query, key)
    return layers


def _swaps(partners: torch.Tensor, weights: torch.Tensor) -> tuple[tuple[slice, slice], ...] | None:
    """Return rotating channels and their partners as slices, if halves or neighbors are paired; otherwise `None`."""
    count = int(weights.ne(0).sum())
    half = count // 2
    for swaps in (
        ((slice(0, half), slice(half, count)), (slice(half, count), slice(0, half))),
        ((slice(0, count, 2), slice(1, count, 2)), (slice(1, count, 2), slice(0, count, 2))),
    ):
        expected = torch.arange(len(partners))
        for here, there in swaps:
            expected[here] = torch.arange(len(partners))[there]
        if torch.equal(expected, partners):
            return swaps
    return None


def _layout(
    layer: str, still: torch.Tensor, rotated: torch.Tensor, bits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return partners, weights, the mask of rotating channels, and the code of each channel's pair, all (dim,)."""
    dim = still.shape[-1]
    before, after = (states.reshape(-1, dim).double() for states in (still, rotated))
    rounding = torch.finfo(still.dtype).eps
    largest = before.abs().max()
    rotates = (before - after).abs().amax(0) > TOLERANCE * largest
    hidden = (before.abs().amax(0) == 0) | (after.abs().amax(0) == 0)
    if bool(hidden.any()):  # a weight of 0 before or after the rotation
        raise UnknownLayout(
            f"{layer} has channels that are always 0 ({hidden.nonzero().flatten().tolist()}), so that how it rotates "
            "cannot be seen"
        )
    # fit every channel after the rotation as a multiple of every channel before it: the partner has the smallest rest
    weights = (after.T @ before) / before.square().sum(0)
    rest = torch.zeros(dim, dim, dtype=torch.float64)
    for one, other in zip(before, after, strict=True):  # one row at a time, to save memory
        torch.maximum(rest, (other[:, None] - weights * one).abs(), out=rest)
    partners = torch.where(rotates, rest.argmin(1), torch.arange(dim))
    if bool((rest.min(1).values[rotates] > max(20 * TOLERANCE, 4 * rounding) * largest).any()):
        raise UnknownLayout(f"{layer} mixes more than two channels")
    weights = weights[torch.arange(dim), partners]
    weights = torch.where((weights.abs() - 1).abs() < max(1e-4, rounding), weights.sign(), weights)
    # a channel has a bit of its code in each row in which it is rotated
    code = torch.zeros(dim, dtype=torch.int64)
    for bit, states in enumerate(bits):
        probe = states.reshape(-1, dim).double()
        quarter = (probe - after).abs().amax(0) < (probe - before).abs().amax(0)
        code += (quarter & rotates).long() << bit
    return partners, torch.where(rotates, weights, 0.0), rotates, code


VOCABULARY, INNER, HEADS, WINDOW = 64, 32, 2, 16
"""Sizes of a narrow skeleton: vocabulary, inner channels of feed-forward layers, key heads, and the sliding window,
which has to show in a short text."""

LARGEST, NARROW, EXPERTS = 150_000_000, 1024, 16
"""Maximum number of weights of a skeleton, width up to which it is always small, and maximum number of experts."""

INNER_NAMES = ("intermediate", "ffn", "n_inner", "d_ff", "mlp_hidden")
"""Parts of config names for the inner size of feed-forward layers."""

FINITE = (0.5, 1.5)
"""Range of one-dimensional weights: away from 0, and practically never 1, so that a norm after the rotation shows."""


def skeleton_of(model: PreTrainedModel) -> PreTrainedModel | None:
    """Return a skeleton of a backbone, whose modules have the same paths and classes, or `None`.

    The skeleton is on the CPU, in float32, in evaluation mode. None can be built if the class needs more than a
    config, or if modules of the model were changed.
    """
    for fewer_heads, narrow in ((True, True), (True, False), (False, False)):
        try:
            config: Any = _shortened(model.config)
            if fewer_heads:
                _drop_heads(config)
            if narrow and vars(config).get("head_dim") and vars(config).get("hidden_size", 0) > VOCABULARY:
                _rewiden(config, config.hidden_size, VOCABULARY)
            if not _is_small(type(model), config):
                continue
            with torch.random.fork_rng(devices=[]), torch.device("cpu"):
                skeleton = type(model)(config).float().eval()
        except Exception:  # model code raises all kinds of errors at unexpected sizes
            continue
        if _alike(skeleton, model):
            _fill(skeleton)
            return skeleton
    return None


def _is_small(cls: type[PreTrainedModel], config: PreTrainedConfig) -> bool:
    """Return whether a skeleton takes little time and memory.

    A narrow model without experts always does. The weights of all others are counted on the meta device.
    """
    known = vars(config)
    if known.get("hidden_size", LARGEST) <= NARROW and not any("experts" in name for name in known):
        return True
    with torch.device("meta"):
        count: int = sum(parameter.numel() for parameter in cls(copy.deepcopy(config)).parameters())
    return count <= LARGEST


def copy_norms(skeleton: PreTrainedModel, model: PreTrainedModel, paths: Iterator[str]) -> bool:
    """Copy the one-dimensional weights of attention layers to the skeleton, and return whether all could be copied.

    A norm after the rotation weights each channel, which changes the measured layout. All other weights are applied
    before the rotation.
    """
    for path in paths:
        real = dict(model.get_submodule(path).named_parameters())
        for name, parameter in skeleton.get_submodule(path).named_parameters():
            if parameter.ndim != 1 or name.endswith("bias"):
                continue
            if name not in real or real[name].shape != parameter.shape or real[name].is_meta:
                return False
            parameter.data.copy_(real[name].detach().float())
    return True


def _alike(skeleton: PreTrainedModel, model: PreTrainedModel) -> bool:
    """Return whether a model has the modules of its skeleton, with the code of their classes.

    Leaf modules may have other classes (quantized linear layers, adapters, faster kernels), because they do not
    rotate. A module with a replaced `forward` counts as changed, unless accelerate replaced it, because accelerate
    calls the original.
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
    """Return the sizes of a module that affect its rotation: those of heads and of frequencies."""
    sizes: dict[str, Any] = {
        name: value
        for name, value in vars(module).items()
        if type(value) is int and ("head" in name or "rot" in name) and ("dim" in name or "size" in name)
    }
    frequencies = (*module._buffers.items(), *vars(module).items())
    sizes |= {name: one.shape for name, one in frequencies if name.endswith("inv_freq") and hasattr(one, "shape")}
    return sizes


def _drop_heads(config: Any) -> None:
    """Leave a config few heads of the same width, and all heads if it has no number of heads."""
    known = vars(config)  # not `getattr`: a config with sizes per layer raises for some names
    heads, width = known.get("num_attention_heads"), known.get("hidden_size")
    if not isinstance(heads, int) or not isinstance(width, int) or heads < 1:
        return
    key_heads = known.get("num_key_value_heads")
    key_heads = key_heads if isinstance(key_heads, int) and key_heads > 0 else heads
    kept = min(HEADS, key_heads)
    queries = kept * min(heads // key_heads, 2)
    less = (known.get("head_dim") or width // heads) * queries
    if less >= width:
        return
    config.num_attention_heads = queries
    if "num_key_value_heads" in known:
        config.num_key_value_heads = kept
    _rewiden(config, width, less)


def _rewiden(config: Any, width: int, less: int) -> None:
    """Set every size of the hidden states in a config to `less`, under all its names."""
    for name, value in list(vars(config).items()):
        is_width = any(part in name for part in ("hidden", "width", "embed", "size")) and "window" not in name
        if type(value) is int and value == width and is_width:
            setattr(config, name, less)


def _shortened(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a config with a small vocabulary and small feed-forward layers, which do not affect attention."""
    short: Any = copy.deepcopy(config)
    short._attn_implementation_internal = config.get_text_config(decoder=True)._attn_implementation
    for name, value in list(vars(short).items()):
        if name.endswith("_token_id") or name in ("pad_index", "eos_index"):
            ids = [token for token in (value if isinstance(value, list) else [value]) if isinstance(token, int)]
            if any(token >= VOCABULARY for token in ids):
                setattr(short, name, 0)
        elif type(value) is not int:
            continue
        elif "vocab" in name:
            setattr(short, name, min(value, VOCABULARY))
        elif name == "sliding_window":
            short.sliding_window = min(value, WINDOW)
        elif name.endswith("experts") and not name.startswith("num_shared"):
            setattr(short, name, min(value, EXPERTS))
        elif any(part in name for part in INNER_NAMES):
            setattr(short, name, min(value, INNER))
    return short


def _fill(skeleton: nn.Module) -> None:
    """Fill a skeleton with random weights.

    No channel is scaled by 0, and scores spread, so that attention depends on positions.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    with torch.no_grad():
        for parameter in skeleton.parameters():
            if parameter.ndim < 2:
                parameter.uniform_(*FINITE, generator=generator)
            else:
                parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
