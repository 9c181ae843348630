"""Rotary modules of a patched model, which store positions and leave the rotation to the attention function."""

from __future__ import annotations

from typing import Any

import torch

from ..detect import RotarySite
from ..undo import Mixin
from .forward import ForwardState, Positions, current_state
from .layout import Probing, Remapping

PRODUCTS = {torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__}
SUMS = {torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__}
_METHODS = torch.Tensor.unsqueeze, torch.Tensor.__getitem__, torch.Tensor.repeat_interleave, torch.Tensor.to
VIEWS = {torch.unsqueeze, *_METHODS}
"""Operations that models apply to phases and that keep ones and zeros unchanged."""

MANY = 1024
"""Number of tokens from which [`Unrotated`] pays off. Its Python code takes a tenth of a millisecond per layer."""


class RotatesLate(Mixin):
    """Mixin for the class of a rotary module that stores the positions and returns the identity.

    In a decoding step with rotated keys in the cache, it returns the phases of the nearest pairs instead.
    """

    _posext_remapping: Remapping | Probing
    _posext_sets: dict[str, str]
    """Name of the set of frequencies, by layer type."""

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None) -> Any:
        remapping = self._posext_remapping
        name = self._posext_sets[layer_type or ""]
        extra = {} if layer_type is None else {"layer_type": layer_type}
        if isinstance(remapping, Probing):
            return _identity(super().forward(x, position_ids, **extra), remapping.quarters[name])
        # outside of a forward (other code calls the layers directly), only the positions are known
        state = current_state(remapping)
        site = RotarySite("", self, name, layer_type or "")
        place = (state or ForwardState(remapping)).note(site, position_ids, x.shape[-2])
        if place.rotated:  # all phases of the step in one call; the model gets the first ones
            out = super().forward(x, on_axes(remapping.bands.step_positions(place.queries), place.axes), **extra)
            place.memo["step phases"] = _parts(out)
            out = out[:, :1] if isinstance(out, torch.Tensor) else type(out)((out[0][:, :1], out[1][:, :1]))
        else:
            out = super().forward(x, position_ids, **extra)
            if not remapping.delta:
                out = _identity(out)
        if not torch.compiler.is_compiling():  # the tensor of the phases carries their positions to the layers
            setattr(out if isinstance(out, torch.Tensor) else out[0], "_posext_at", place)  # noqa: B010  no such field
        return out


def on_axes(positions: torch.Tensor, axes: int | None) -> torch.Tensor:
    """Return positions on the number of axes that a rotary module expects."""
    return positions if axes is None or positions.ndim == 3 else positions.expand(axes, -1, -1)


def phases_at(place: Positions, positions: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosine and sine (batch, tokens, slots) at requested positions, by the rotary module of a forward.

    Phases get the dtype and device of `like`.
    """
    remapping, name, positions = place.state.remapping, place.site.name, on_axes(positions, place.axes)
    if name not in remapping.growths:
        return own_phases(place.site, positions, like)
    lengths = place.lengths(positions)
    scales = (lengths.float() / remapping.plan.trained_length).clamp(min=1.0)
    shape = torch.broadcast_shapes(positions.shape[-2:], scales.shape)  # type: ignore[no-untyped-call]
    positions, scales = positions.expand(*positions.shape[:-2], *shape), scales.to(positions.device).expand(shape)
    device, growth = _frequencies(place.site).device, remapping.growths[name]
    moving, power, fixed = remapping.growth(name, device)

    def grown(position: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the phases of one token, with the frequencies of the length of its document."""
        twin = _twin(place.site, moving * scale ** (-power) + fixed)
        cos, sin = own_phases(twin, position[..., None, None], like)
        sharper = (1 + growth.temperature * scale.log()).to(cos)
        return cos * sharper, sin * sharper

    # each token has its own frequencies, which neither the host nor a graph has to know
    cos, sin = torch.vmap(grown, (-1, 0))(positions.flatten(-2), scales.flatten().to(device))
    return cos.view(*shape, -1), sin.view(*shape, -1)


def pair_phases(place: Positions, positions: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return [`phases_at`] with separate positions (batch or 1, tokens, slots of frequencies) for each frequency slot.

    For each token, a twin of the rotary module, with the token's angles as frequencies, is called for position 1.
    """
    frequencies = _frequencies(place.site)
    angles = positions.to(frequencies.device) * frequencies
    first = on_axes(torch.ones(1, 1, dtype=torch.long, device=frequencies.device), place.axes)
    phases_of = torch.vmap(lambda angle: own_phases(_twin(place.site, angle), first, like))
    cos, sin = phases_of(angles.flatten(0, 1))
    return cos.view(*positions.shape[:2], -1), sin.view(*positions.shape[:2], -1)


def follows_angles(site: RotarySite, length: int) -> bool:
    """Return whether the phases of a rotary module depend on angles only, that is, on position times frequency.

    Those of a module that computes its frequencies in each call (phimoe) do not.
    """
    frequencies = _frequencies(site)
    last = torch.full((1, 1), length - 1, device=frequencies.device)
    direct = own_phases(site, last, frequencies)
    scaled = own_phases(_twin(site, (length - 1) * frequencies), torch.ones_like(last), frequencies)
    return all(torch.allclose(*sides, atol=1e-5, rtol=0) for sides in zip(direct, scaled, strict=True))


def own_phases(site: RotarySite, positions: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosine and sine at positions from the forward of a module's original class, on the device of `like`.

    The forward is taken from the class. A hook may have put a bound forward on the instance, which a twin with other
    frequencies would inherit, and which would use the frequencies of the module.
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
    return getattr(site.module, f"{site.prefix}inv_freq")  # type: ignore[no-any-return]


def _twin(site: RotarySite, frequencies: torch.Tensor) -> RotarySite:
    """Return a twin of a rotary module with other frequencies. Other threads may use the module itself."""
    twin: Any = object.__new__(type(site.module))
    twin.__dict__.update(site.module.__dict__)
    name = f"{site.prefix}inv_freq"
    if name in site.module._buffers:
        twin._buffers = {**site.module._buffers, name: frequencies}
    else:
        twin.__dict__[name] = frequencies
    return RotarySite(site.path, twin, site.name, site.layer_type)


def _identity(out: Any, rows: torch.Tensor | None = None) -> Any:
    """Replace the phases in a rotary module's output by quarter rotations (rows, slots), or by the identity."""
    cos, _ = _parts(out)
    # graphs fuse what `Unrotated` avoids
    many = cos.shape[-2] >= MANY and not torch.compiler.is_compiling()
    if rows is None and not isinstance(out, torch.Tensor) and many:
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
    """Phases of the identity rotation, ones or zeros, which cost nothing to multiply and add.

    Every model family applies its phases by `x * cos + rotate_half(x) * sin` or a similar expression. This takes ten
    passes over memory, which on a GPU is a sixth of the time of attention over 32k tokens, and leaves queries and keys
    unchanged. Products with these ones, and sums with these zeros, are not computed. All other operations return
    ordinary tensors.
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


def unrotated(like: torch.Tensor) -> tuple[Ones, Zeros]:
    """Return identity cosines and sines with the shape, dtype, and device of `like`."""
    return torch.ones_like(like).as_subclass(Ones), torch.zeros_like(like).as_subclass(Zeros)


def _leaves_its_form(constant: torch.Tensor, states: Any) -> bool:
    """Return whether a product or sum with a constant has the shape and dtype of the states."""
    if not isinstance(states, torch.Tensor) or isinstance(states, Unrotated) or states.ndim < constant.ndim:
        return False
    sizes = zip(constant.shape[::-1], states.shape[::-1], strict=False)
    return torch.result_type(states, constant) == states.dtype and all(width in (1, size) for width, size in sizes)
