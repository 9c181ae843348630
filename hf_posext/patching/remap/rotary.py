"""Rotary modules of a patched model: they note the positions, and leave the rotation to the attention."""

from __future__ import annotations

from typing import Any

import torch

from ..detect import RotarySite
from ..mixin import Mixin
from .forward import ForwardState, carry, current_state
from .identity_phases import unturned, worth_it
from .layout import Probing
from .positions import Positions, on_axes
from .remapping import Remapping


class RotatesLate(Mixin):
    """Mixed into the class of a rotary module: notes the positions, and returns the identity.

    Where the cached keys are rotated, it returns the phases of a step's nearest pairs."""

    _posext_remapping: Remapping | Probing
    _posext_sets: dict[str, str]
    """The set of frequencies that each layer type asks for."""

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None) -> Any:
        remapping = self._posext_remapping
        name = self._posext_sets[layer_type or ""]
        extra = {} if layer_type is None else {"layer_type": layer_type}
        if isinstance(remapping, Probing):
            return _identity(super().forward(x, position_ids, **extra), remapping.quarters[name])
        # outside of a forward (other code calls the layers) the positions are all that is known
        state = current_state(remapping)
        at = (state or ForwardState(remapping)).note(
            RotarySite("", self, name, layer_type or ""), position_ids, x.shape[-2]
        )
        if at.rotated:
            out = super().forward(x, on_axes(remapping.bands.step_positions(at.queries), at.axes), **extra)
            at.memo["asked"] = _parts(out)
            out = out[:, :1] if isinstance(out, torch.Tensor) else type(out)((out[0][:, :1], out[1][:, :1]))
        else:
            out = super().forward(x, position_ids, **extra)
            if not remapping.delta:
                out = _identity(out)
        carry(out, at)
        return out


def phases_at(at: Positions, wanted: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosine and sine (batch, tokens, slots) at positions, as the rotary module of a forward gives them.

    Args:
        at (`Positions`): of the forward.
        wanted (`torch.Tensor` of shape `(batch or 1, tokens)` or `(axes, batch or 1, tokens)`): positions.
        like (`torch.Tensor`): its dtype and device are taken.
    """
    remapping, wanted = at.state.remapping, on_axes(wanted, at.axes)
    if at.name not in remapping.growths:
        return own_phases(at.site, wanted, like)
    lengths = at.lengths(wanted)
    scales = (lengths / remapping.plan.trained_length).clamp(min=1.0)
    shape = torch.broadcast_shapes(wanted.shape[-2:], scales.shape)  # type: ignore[no-untyped-call]
    wanted, scales = wanted.expand(*wanted.shape[:-2], *shape), scales.to(wanted.device).expand(shape)
    device, temperature = _frequencies(at.site).device, remapping.growths[at.name].temperature
    numbers = remapping.growth(at.name, device)
    # each token has its own frequencies, and neither the host nor a graph need know which
    grown = torch.vmap(
        lambda position, scale: _grown_phases(at.site, numbers, temperature, position[..., None, None], scale, like),
        (-1, 0),
    )
    cos, sin = grown(wanted.flatten(-2), scales.flatten().to(device))
    return cos.view(*shape, -1), sin.view(*shape, -1)


def pair_phases(at: Positions, wanted: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosine and sine (batch, tokens, slots) where each slot of frequencies has positions of its own.

    A twin of the rotary module for each token has the angles for frequencies, and is asked for position 1.

    Args:
        at (`Positions`): of the forward.
        wanted (`torch.Tensor` of shape `(batch or 1, tokens, slots of frequencies)`): positions.
        like (`torch.Tensor`): its dtype and device are taken.
    """
    frequencies = _frequencies(at.site)
    angles = wanted.to(frequencies.device) * frequencies
    first = on_axes(torch.ones(1, 1, dtype=torch.long, device=frequencies.device), at.axes)
    ask = torch.vmap(lambda angle: own_phases(_twin(at.site, angle), first, like))
    cos, sin = ask(angles.flatten(0, 1))
    return cos.view(*wanted.shape[:2], -1), sin.view(*wanted.shape[:2], -1)


def own_phases(site: RotarySite, positions: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what a module's own forward gives at positions, below the mixin. Layers may be on other devices."""
    module: Any = site.module
    extra = {"layer_type": site.layer_type} if site.layer_type else {}
    device = _frequencies(site).device
    x = torch.empty(0, dtype=like.dtype, device=device)
    below: Any = super(RotatesLate, module) if isinstance(module, RotatesLate) else module
    cos, sin = _parts(below.forward(x, positions.to(device), **extra))
    return cos.to(like.device), sin.to(like.device)


def _frequencies(site: RotarySite) -> torch.Tensor:
    frequencies: torch.Tensor = getattr(site.module, f"{site.prefix}inv_freq")
    return frequencies


def _grown_phases(
    site: RotarySite,
    numbers: torch.Tensor,
    temperature: float,
    positions: torch.Tensor,
    scale: torch.Tensor,
    like: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Phases with the frequencies that a document of one length has: `numbers` (3, slots) and `temperature` are those
    of [`Growth`].

    """
    moving, power, kept = numbers
    cos, sin = own_phases(_twin(site, moving * scale ** (-power) + kept), positions, like)
    sharper = (1 + temperature * scale.log()).to(cos)
    return cos * sharper, sin * sharper


def _twin(site: RotarySite, frequencies: torch.Tensor) -> RotarySite:
    """Return a twin of a rotary module with other frequencies; the module, which other threads may ask, keeps its
    own."""
    twin: Any = object.__new__(type(site.module))
    twin.__dict__.update(site.module.__dict__)
    name = f"{site.prefix}inv_freq"
    if name in site.module._buffers:
        twin._buffers = {**site.module._buffers, name: frequencies}
    else:
        twin.__dict__[name] = frequencies
    return RotarySite(site.path, twin, site.name, site.layer_type)


def _identity(out: Any, rows: torch.Tensor | None = None) -> Any:
    """A rotary module's output with quarter rotations (rows, slots) in place of its phases; none if not given."""
    cos, _ = _parts(out)
    if rows is None and not isinstance(out, torch.Tensor) and worth_it(cos):
        return type(out)(unturned(cos))
    quarters = torch.zeros_like(cos)
    if rows is not None:
        quarters = rows[:, None].to(cos).expand(*cos.shape[:-3], -1, *cos.shape[-2:])
    if isinstance(out, torch.Tensor):
        return torch.complex((1 - quarters).float(), quarters.float())
    return type(out)((1 - quarters, quarters))


def _parts(out: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of a rotary module's output, which may be complex."""
    return (out.real, out.imag) if isinstance(out, torch.Tensor) else (out[0], out[1])
