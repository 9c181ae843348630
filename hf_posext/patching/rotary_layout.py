"""Measures how each attention layer of a model rotates its queries and keys.

transformers has nineteen different functions that apply rotary phases: halves or interleaved, part of the head or all
of it, one that permutes its output, one that turns the other way, a weighted norm after it. None is looked at. A few
five-token forwards, with the attention's output zeroed and every phase at 0 or 90 degrees, tell for each channel of
the queries and keys that reach the attention function: `out_c = x_c cos[s] + g x_p sin[s]`, with its partner p, sign
and weight g, and the slot s of the rotary module's output that drives it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

Captured = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Queries and keys (batch, heads, tokens, dim) that reached the attention function, by layer."""

Angle = Callable[[str, torch.Tensor], torch.Tensor]
"""From the name of a set and its cosines: 0 or 1 (quarter turns) for each slot."""

TOLERANCE = 1e-5
"""Of the largest value, in float32: probes are exact rotations by 0 or 90 degrees, so that only a norm after them
rounds. In half precision that rounds by up to one unit in the last place."""


@dataclass(frozen=True)
class Layout:
    """How the channels of queries or keys turn; tensors of shape (dim,). `turns` is `None` where all channels do."""

    slots: torch.Tensor
    partners: torch.Tensor
    weights: torch.Tensor
    turns: torch.Tensor | None

    def rotate(self, states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Queries or keys (batch, heads, tokens, dim) turned by phases (batch, tokens, slots)."""
        turned = states * cos[..., self.slots].unsqueeze(1)
        weights = self.weights.to(states.dtype)
        turned = turned + states[..., self.partners] * (sin[..., self.slots] * weights).unsqueeze(1)
        turned = turned.to(states.dtype)
        return turned if self.turns is None else torch.where(self.turns, turned, states)

    def is_rotation(self) -> bool:
        """Whether the opposite phases turn back: channels are each other's partners, with opposite weights."""
        turns = torch.ones_like(self.slots, dtype=torch.bool) if self.turns is None else self.turns
        mutual = self.partners[self.partners] == torch.arange(len(self.partners), device=self.partners.device)
        opposite = (self.weights * self.weights[self.partners] + 1).abs() < 1e-2  # measured in half precision, at worst
        return bool(((mutual & opposite) | ~turns).all())

    def to(self, device: torch.device) -> Layout:
        """The same on a device."""
        turns = None if self.turns is None else self.turns.to(device)
        return Layout(self.slots.to(device), self.partners.to(device), self.weights.to(device), turns)


@dataclass(frozen=True)
class LayerLayout:
    """What the attention function has to know of one layer: its set of frequencies, and how channels turn."""

    rotary: str
    query: Layout
    key: Layout

    def to(self, device: torch.device) -> LayerLayout:
        """The same on a device."""
        if self.query.slots.device == device:
            return self
        return LayerLayout(self.rotary, self.query.to(device), self.key.to(device))


class UnknownLayout(Exception):
    """A layer whose queries and keys do not turn as rotary phases do."""


def measure(forward: Callable[[Angle], Captured], groups: Callable[[str], torch.Tensor]) -> dict[str, LayerLayout]:
    """The layouts of all layers that turn; layers without rotary phases are not in the answer.

    Args:
        forward: runs the model with the given quarter turns in place of phases and tells what reached attention.
        groups: for a set, the pair of each slot (slots of one pair have the same phase), int64 of shape (slots,).

    Raises:
        UnknownLayout: names the layer.
    """
    names: list[str] = []

    def none(name: str, cos: torch.Tensor) -> torch.Tensor:
        if name not in names:
            names.append(name)
        return torch.zeros_like(cos)

    still = forward(none)
    turned = forward(lambda name, cos: torch.ones_like(cos))
    pairs = {name: groups(name) for name in names}
    codes, first = {}, 1
    for name in names:
        codes[name] = pairs[name] + first
        first += int(pairs[name].max()) + 1
    bits = []
    for bit in range(max(first - 1, 1).bit_length()):
        bits.append(
            forward(lambda name, cos, bit=bit: ((codes[name] >> bit) & 1).to(cos).expand_as(cos))  # type: ignore[misc]
        )
    layers = {}
    for layer in still:
        found = [
            _layout(layer, still[layer][side], turned[layer][side], [b[layer][side] for b in bits]) for side in (0, 1)
        ]
        if not any(bool(turns.any()) for _, _, turns, _ in found):
            continue
        code = torch.cat([code[turns] for _, _, turns, code in found])
        sets = [name for name in names if bool(torch.isin(code, codes[name]).any())]
        if len(sets) != 1 or not bool(torch.isin(code, codes[sets[0]]).all()):
            raise UnknownLayout(f"{layer} is turned by {len(sets)} sets of frequencies")
        slot_of = {int(c): slot for slot, c in reversed(list(enumerate(codes[sets[0]].tolist())))}
        layouts = [
            Layout(
                torch.tensor([slot_of.get(int(c), 0) for c in code]),
                partners,
                weights,
                None if bool(turns.all()) else turns,
            )
            for partners, weights, turns, code in found
        ]
        layers[layer] = LayerLayout(sets[0], *layouts)
    return layers


def _layout(
    layer: str, still: torch.Tensor, turned: torch.Tensor, bits: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Partners, weights, which channels turn, and the code of the pair that drives each; all of shape (dim,)."""
    dim = still.shape[-1]
    before, after = (t.reshape(-1, dim).double() for t in (still, turned))
    rounding = torch.finfo(still.dtype).eps
    scale = TOLERANCE * before.abs().max()
    turns = (before - after).abs().amax(0) > scale
    # every channel after the turn as a multiple of every channel before it; the partner is the one that leaves least
    weights = (after.T @ before) / (before.square().sum(0) + 1e-300)
    residual = torch.stack([(after[:, c : c + 1] - weights[c] * before).abs().amax(0) for c in range(dim)])
    partners = torch.where(turns, residual.argmin(1), torch.arange(dim))
    if bool((residual.min(1).values[turns] > max(20 * TOLERANCE, 4 * rounding) * before.abs().max()).any()):
        raise UnknownLayout(f"{layer} mixes more than two channels")
    weights = weights[torch.arange(dim), partners]
    weights = torch.where((weights.abs() - 1).abs() < max(1e-4, rounding), weights.sign(), weights)
    code = torch.zeros(dim, dtype=torch.int64)
    for bit, states in enumerate(bits):
        probe = states.reshape(-1, dim).double()
        quarter = (probe - after).abs().amax(0) < (probe - before).abs().amax(0)
        code += (quarter & turns).long() << bit
    return partners, torch.where(turns, weights, 0.0), turns, code
