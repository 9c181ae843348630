"""What the parts of a late rotation share, and the phases where the tokens of a forward are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from ...errors import EvaluationError
from ...plan import ExtensionPlan, PositionMap
from ..detect import RotarySite, text_config
from ..mixin import Mixin
from .attention import MASKS, lease
from .cache import close_cache, close_slot, find_cache, open_cache, open_slot, seen_for_free
from .decoding_step import step_positions
from .identity_phases import unturned, worth_it
from .layout import Captured, LayerLayout, Quarters
from .positions import Positions, border, key_map


class LateRotation:
    """What the rotary modules, the attention function and the hooks of one patched model share.

    Plain data and tensors, so that copies and pickles of the model carry their own.
    """

    def __init__(self, plan: ExtensionPlan, base: str, delta: bool) -> None:
        self.plan = plan
        self.base = base
        self.delta = delta
        self.sites: dict[str, RotarySite] = {}
        self.layers: dict[str, LayerLayout] = {}
        grown = ((entry.name, entry.growth) for entry in plan.rotaries)
        # on the device from the first forward on: the host would wait for it to get them in each
        self.grown = {
            name: torch.tensor((own.moving, own.power, own.kept), dtype=torch.float32) for name, own in grown if own
        }
        self.quarters: Quarters | None = None
        self.captured: Captured = {}
        self.unmapped = True  # until the layouts are known and checked
        self.keeps_turned = False  # until it is checked that nothing else reads the cached keys
        self.cache: Any = None
        self.latest: dict[str, Positions] = {}
        self.carried: dict[str, Positions] = {}
        self.loose: set[str] = set()  # sets of frequencies of layers whose cached keys are not turned
        self.past: torch.Tensor | None = None
        self.slot: torch.Tensor | None = None
        self.release = lease(self)

    @property
    def plan(self) -> ExtensionPlan:
        """What is in force."""
        return self._plan

    @plan.setter
    def plan(self, plan: ExtensionPlan) -> None:
        self._plan = plan
        self.query_maps = _distinct([part.query for part in plan.parts])
        self.key_maps = _distinct([part.key for part in plan.parts])
        self.border = border(plan.parts)
        self.nearest = key_map(plan.parts, 0)
        maps = self.query_maps[0]
        self.stays = maps.index(self.nearest) if self.nearest in maps else None
        self.onward = tuple(rule for rule in maps if rule != self.nearest)

    def __getstate__(self) -> dict[str, Any]:
        """All but what belongs to the forward at hand or to this process."""
        lasting = {name: value for name, value in vars(self).items() if name != "release"}
        here: dict[str, Any] = {"latest": {}, "carried": {}, "loose": set()}
        return lasting | here | dict.fromkeys(("past", "slot", "cache"))

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.release = lease(self)

    def note(self, name: str, given: torch.Tensor, tokens: int) -> Positions:
        """Remember where the tokens are, as a rotary module is asked for their phases."""
        if self.slot is not None and given.shape[-1] == 1 and given.ndim == 2:
            slots = torch.arange(self.cache.layers[0].max_cache_len, device=given.device)
            keys = (given + slots - self.slot.to(given.device)).clamp(min=0)
            turned = name in self.cache._posext_standing[0]
            self.latest[name] = Positions(name, given, keys, False, True, _backward_task(), self.slot, turned)
            return self.latest[name]
        if self.slot is not None:
            self.past, self.slot = open_cache(self.cache, self.plan), None
        if self.past is not None and given.shape[-1] == self.past.shape[-1] + tokens:
            given = given[..., -tokens:]  # Qwen4's indexer wants the phases of the cached keys again
        keys = given if given.ndim == 2 else given[0]
        single = keys.shape[1] == 1
        if self.past is not None:
            rows = max(keys.shape[0], self.past.shape[0])
            keys = torch.cat([self.past.expand(rows, -1).to(keys.device), keys.expand(rows, -1)], -1)
        aligned, regular = self._order(keys, single)
        turned = False
        if single and regular and given.ndim == 2 and self.past is not None:
            standing, count = self.cache._posext_standing
            turned = name in standing and count == self.past.shape[-1]
        self.latest[name] = Positions(name, given, keys, aligned, regular, _backward_task(), None, turned)
        return self.latest[name]

    def _order(self, keys: torch.Tensor, single: bool) -> tuple[bool, bool]:
        """Whether positions (rows, keys) are aligned and regular. For a single token this looks at no tensor for which
        the host would have to wait: what holds of the cache holds on, if the token follows."""
        if torch.compiler.is_compiling():  # it cannot look; it attends to masked rectangles where bands would do
            return False, False
        if single and self.past is not None:
            order: tuple[bool, bool] = self.cache._posext_order
            follows = (keys[:, -1] == keys[:, -2] + 1).all()
            if not any(order) or seen_for_free(follows) and follows:
                return order
            if not seen_for_free(follows):
                torch._assert_async(follows, "the position of a single token must follow those in the cache")
                return order
        index = torch.arange(keys.shape[1], device=keys.device)
        shift = index[-1:] - keys[:, -1:]
        padding = (index < shift) & (keys <= 1) & (keys == keys[:, :1])
        aligned, regular = torch.stack([(keys == index).all(), ((keys == index - shift) | padding).all()]).tolist()
        return aligned, regular

    def positions(self, name: str) -> Positions:
        """Where the tokens are that a layer attends from.

        Those that came with its phases, as a gradient checkpoint may run the layer after another forward; the latest
        where phases did not pass through its arguments (compiled graphs, and layers with a rotary module inside).
        """
        found = self.carried.get(name) or self.latest[name]
        if name not in self.carried and found.task != _backward_task():
            raise EvaluationError(
                "a gradient checkpoint runs a layer again whose phases came without their positions; "
                "turn gradient checkpointing off for this model: model.gradient_checkpointing_disable()"
            )
        return found

    def phases(self, at: Positions, wanted: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine (batch, tokens, slots) at wanted positions (batch, tokens), or (axes, batch, tokens) in
        multimodal models; in the dtype and on the device of `like`."""
        site = self.sites[at.name]
        entry = next((rotary for rotary in self.plan.rotaries if rotary.name == at.name), None)
        if entry is None or entry.growth is None or self.unmapped:
            return own_phases(site, wanted, like)
        lengths = at.lengths(wanted)
        scales = (lengths / self.plan.original_length).clamp(min=1.0)
        shape = torch.broadcast_shapes(wanted.shape[-2:], scales.shape)  # type: ignore[no-untyped-call]
        wanted, scales = wanted.expand(*wanted.shape[:-2], *shape), scales.to(wanted.device).expand(shape)
        device, temperature = getattr(site.module, f"{site.prefix}inv_freq").device, entry.growth.temperature
        numbers = self.grown[at.name]
        if numbers.device != device:
            numbers = self.grown[at.name] = numbers.to(device)
        # each token has its own frequencies, and neither the host nor a graph need know which
        grown = torch.vmap(
            lambda position, scale: _grown_phases(site, numbers, temperature, position[..., None, None], scale, like),
            (-1, 0),
        )
        cos, sin = grown(wanted.flatten(-2), scales.flatten().to(device))
        return cos.view(*shape, -1), sin.view(*shape, -1)

    def before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hook of the model: find the positions of the keys in the cache."""
        chosen = text_config(module.config)._attn_implementation
        if chosen not in MASKS:
            raise EvaluationError(
                f"the attention was set to {chosen!r} while a patch that rotates in it is in force; "
                "undo the patch, set the attention, then patch again"
            )
        cache = find_cache((*args, *kwargs.values()))
        self.slot = open_slot(cache, self.plan)
        self.past = None if cache is None or self.slot is not None else open_cache(cache, self.plan)
        self.cache, self.latest, self.loose = cache, {}, set()

    def after_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Hook of the model: leave the positions of the keys with the cache that holds them."""
        values = output.values() if hasattr(output, "values") else output if isinstance(output, tuple) else ()
        cache = find_cache((*values, *args, *kwargs.values()))
        if self.slot is not None and self.latest:
            close_slot(cache, next(iter(self.latest.values())).given)
            self.latest = {}  # or its tensors would outlive the graph
        elif cache is not None and self.latest:
            at = next(iter(self.latest.values()))
            standing = frozenset(self.latest) - self.loose if self.keeps_turned else frozenset()
            close_cache(cache, self.plan, at.keys, (at.aligned, at.regular), standing)
        for at in self.latest.values():
            at.memo.clear()
        self.past = self.slot = self.cache = None

    def before_layer(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hook of an attention layer: find the positions that came with its phases. Without gradients there is no
        checkpoint that runs it again after another forward."""
        again = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        found = _carried((*args, *kwargs.values())) if again else ()
        self.carried = {at.name: at for at in found}


def _distinct(maps: list[PositionMap]) -> tuple[tuple[PositionMap, ...], list[int]]:
    """Each map once, and which of these each part has."""
    distinct = tuple(dict.fromkeys(maps))
    return distinct, [distinct.index(one) for one in maps]


def _carried(values: Iterable[Any]) -> Iterator[Positions]:
    for value in values:
        for one in value if isinstance(value, tuple) else (value,):
            at = getattr(one, "_posext_at", None)
            if at is not None:
                yield at


def _backward_task() -> int:
    return -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


class RotatesLate(Mixin):
    """Mixed into the class of a rotary module: notes the positions, and returns the identity; where cached keys stand
    turned, the phases of a step's nearest pairs."""

    _posext_late: LateRotation
    _posext_sets: dict[str, str]
    """The set of frequencies that each layer type asks for."""

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None) -> Any:
        late = self._posext_late
        name = self._posext_sets[layer_type or ""]
        extra = {} if layer_type is None else {"layer_type": layer_type}
        if late.quarters is not None:
            return _turned(super().forward(x, position_ids, **extra), late.quarters[name])
        at = late.note(name, position_ids, x.shape[-2])
        if at.turned:
            out = super().forward(x, step_positions(late, at), **extra)
            at.memo["asked"] = _parts(out)
            out = out[:, :1] if isinstance(out, torch.Tensor) else type(out)((out[0][:, :1], out[1][:, :1]))
        else:
            out = super().forward(x, position_ids, **extra)
            if not late.delta:
                out = _turned(out)
        if not torch.compiler.is_compiling():
            setattr(out if isinstance(out, torch.Tensor) else out[0], "_posext_at", at)  # noqa: B010  no such field
        return out


def _turned(out: Any, rows: torch.Tensor | None = None) -> Any:
    """A rotary module's output with quarter turns (rows, slots) in place of its phases; without turns if not given."""
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


def own_phases(site: RotarySite, positions: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the module's own forward gives at positions, below the mixin; layers may be on other devices than it."""
    module: Any = site.module
    extra = {"layer_type": site.layer_type} if site.layer_type else {}
    device = getattr(module, f"{site.prefix}inv_freq").device
    x = torch.empty(0, dtype=like.dtype, device=device)
    cos, sin = _parts(super(RotatesLate, module).forward(x, positions.to(device), **extra))
    return cos.to(like.device), sin.to(like.device)


def _grown_phases(
    site: RotarySite,
    numbers: torch.Tensor,
    temperature: float,
    positions: torch.Tensor,
    scale: torch.Tensor,
    like: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Phases with the frequencies that a document of one length has: `numbers` (3, slots) and `temperature` are those
    of [`Growth`]."""
    name = f"{site.prefix}inv_freq"
    held: torch.Tensor = getattr(site.module, name)
    moving, power, kept = numbers
    try:
        setattr(site.module, name, moving * scale ** (-power) + kept)
        cos, sin = own_phases(site, positions, like)
    finally:
        setattr(site.module, name, held)
    sharper = (1 + temperature * scale.log()).to(cos)
    return cos * sharper, sin * sharper
