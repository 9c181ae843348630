"""Rotary modules of a patched model: they note the positions, and leave the rotation to the attention."""

from __future__ import annotations

from typing import Any

import torch

from ..detect import RotarySite
from ..mixin import Mixin
from .forward import ForwardState, carry, current_state
from .layout import Probing
from .positions import Positions, on_axes
from .remapping import Remapping

PRODUCTS = frozenset((torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__))
SUMS = frozenset((torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__))
VIEWS = frozenset(
    (
        torch.unsqueeze,
        torch.Tensor.unsqueeze,
        torch.Tensor.__getitem__,
        torch.Tensor.repeat_interleave,
        torch.Tensor.to,
    )
)
"""Of all that models do to phases before they apply them, what leaves ones ones and zeros zeros."""

MANY = 1024
"""Tokens from which it is worth it: in Python, this takes a layer a tenth of a millisecond."""


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
    # each token has its own frequencies, and neither the host nor a graph needs to know which
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


def follows_angles(site: RotarySite, length: int) -> bool:
    """Return whether a rotary module gives the phases of an angle, whatever position it comes from. One that computes
    its frequencies anew in each call (phimoe) does not."""
    frequencies = _frequencies(site)
    last = torch.full((1, 1), length - 1, device=frequencies.device)
    wanted = own_phases(site, last, frequencies)
    found = own_phases(_twin(site, (length - 1) * frequencies), torch.ones_like(last), frequencies)
    return all(torch.allclose(*sides, atol=1e-5, rtol=0) for sides in zip(wanted, found, strict=True))


def own_phases(site: RotarySite, positions: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the forward of a module's class gives at positions, below the mixin. Layers may be on other devices.

    A hook puts a forward on the instance that is bound to it, so that a twin with other frequencies would ask the
    module instead.
    """
    module: Any = site.module
    extra = {"layer_type": site.layer_type} if site.layer_type else {}
    device = _frequencies(site).device
    x = torch.empty(0, dtype=like.dtype, device=device)
    late = isinstance(module, RotatesLate)
    forward: Any = super(RotatesLate, module).forward if late else type(module).forward.__get__(module)
    cos, sin = _parts(forward(x, positions.to(device), **extra))
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
    """Return phases with the frequencies of a document of one length, by the `numbers` (3, slots) and `temperature` of
    [`Growth`]."""
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
    """Return a rotary module's output with quarter rotations (rows, slots) in place of its phases, or with none."""
    cos, _ = _parts(out)
    if rows is None and not isinstance(out, torch.Tensor) and worth_it(cos):
        return type(out)(unrotated(cos))
    quarters = torch.zeros_like(cos)
    if rows is not None:
        quarters = rows[:, None].to(cos).expand(*cos.shape[:-3], -1, *cos.shape[-2:])
    if isinstance(out, torch.Tensor):
        return torch.complex((1 - quarters).float(), quarters.float())
    return type(out)((1 - quarters, quarters))


def _parts(out: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosine and sine of a rotary module's output, which may be complex."""
    return (out.real, out.imag) if isinstance(out, torch.Tensor) else (out[0], out[1])


class Unrotated(torch.Tensor):
    """Phases that rotate nothing, by which a model multiplies at no cost: ones or zeros.

    Every family applies its phases as `x * cos + rotate_half(x) * sin` or much like it: ten passes over memory, on a
    GPU a sixth of the time of attention over 32k tokens, in order to leave queries and keys as they are. Products with
    these ones, and sums with such zeros, are not computed. All other operations return ordinary tensors.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func in VIEWS:
                return func(*args, **(kwargs or {})).as_subclass(cls)
            if func in PRODUCTS or func in SUMS:
                constant, states = args if isinstance(args[0], Unrotated) else reversed(args)
                if not kwargs and _leaves_its_form(constant, states):
                    if isinstance(constant, Ones if func in PRODUCTS else Zeros):
                        return states
                    if func in PRODUCTS:
                        return constant.expand(states.shape).as_subclass(Zeros)
            return func(*args, **(kwargs or {}))


class Ones(Unrotated):
    """Cosines."""


class Zeros(Unrotated):
    """Sines, and products with them."""


def worth_it(like: torch.Tensor) -> bool:
    """Return whether phases (..., tokens, slots) are of so many tokens that it counts. Compiled graphs fuse anyway."""
    return like.shape[-2] >= MANY and not torch.compiler.is_compiling()


def unrotated(like: torch.Tensor) -> tuple[Ones, Zeros]:
    """Return cosines and sines of the shape, dtype and device of others."""
    return torch.ones_like(like).as_subclass(Ones), torch.zeros_like(like).as_subclass(Zeros)


def _leaves_its_form(constant: torch.Tensor, states: Any) -> bool:
    """Return whether states have the shape and dtype of their product or sum with a constant."""
    if not isinstance(states, torch.Tensor) or isinstance(states, Unrotated) or states.ndim < constant.ndim:
        return False
    sizes = zip(constant.shape[::-1], states.shape[::-1], strict=False)
    return torch.result_type(states, constant) == states.dtype and all(one in (1, size) for one, size in sizes)
