"""Installation of a remapping in a model, after measuring its rotation and checking that nothing else changes."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ...errors import EvaluationError, UnsupportedModelError
from ...plan import Band, ExtensionPlan, PositionMap
from ..detect import RotarySite, model_code, rotary_sites, text_config
from ..effect import claimed_window, layer_number, refuse_idle
from ..kernels.bands import SAME
from ..modes import cache_argument, cache_of, evaluation_mode, switch_attention, with_cache
from ..undo import UndoLog, mix
from .attention import HONOURED, Lease, arguments_read, base_function
from .forward import ATTENTION, begin_forward, begin_layer, both_sides, end_forward
from .layout import WINDOW, Layer, Probing, Quarters, Remapping, UnknownLayout, copy_norms, measure, skeleton_of
from .paged import ServesBatches
from .rotary import RotatesLate, follows_angles, own_phases

CHECK_TOKENS = 24

SELECTED = ("index_topk", "indexer_budget")
"""Config names for the number of keys that an indexer selects. The check has at most as many tokens, because selection
follows the positions of the model."""

FAR = 2**24
"""Position beyond every length at which frequencies change."""

TWICE = PositionMap(rate=2)

TWO_BANDS = Band(SAME, SAME, high=CHECK_TOKENS // 3), Band(SAME, SAME, low=CHECK_TOKENS // 3)
"""Bands that leave all positions unchanged. Attention over them equals that of the unpatched model."""


@dataclass(frozen=True)
class Subject:
    """Model that is probed for its rotation: a skeleton, or the model itself."""

    root: PreTrainedModel  # model that is called with token ids
    prefix: str  # prefix that turns a path in the root into a path in the model
    backbone: PreTrainedModel  # model inside the root that receives the cache
    sites: list[RotarySite]  # rotary modules of the root, with the names of the model's
    bare: bool  # whether the root is a skeleton


def apply_late_rotation(model: PreTrainedModel, plan: ExtensionPlan, log: UndoLog) -> str:
    """Make a model rotate inside its attention, and return the reason why a saved checkpoint needs this package.

    As a check, the model first runs without remapped positions, through the attention branch that users will run. It
    must return the same states as with its own rotation.

    Raises:
        UnsupportedModelError: the model fails the check, its attention cannot be reached, or it does not rotate like
            RoPE. The message contains the reason.
        NoEffectError: the plan changes no pair of tokens that a layer sees.
    """
    kind = plan.scheme.model_type
    if any(entry.short_inv_freq is not None for entry in plan.rotaries):
        raise UnsupportedModelError(
            f"Expected one LongRoPE list in {plan.method}, which remaps positions, got two. Pass one list."
        )
    by_pair = any(mapping.by_pair for band in plan.bands for mapping in (band.query, band.key))
    if by_pair and any(entry.growth for entry in plan.rotaries):
        raise UnsupportedModelError(
            f"Expected frequencies that stay in {plan.method}, which maps positions by rotary pairs, got frequencies "
            "that follow rows. Pass e.g. yarn before it."
        )
    indexed = any("Indexer" in type(module).__name__ for module in model.modules())
    if indexed and (plan.follows_rows or by_pair):
        raise UnsupportedModelError(
            f"Expected keys that nothing selects by their rotated states, got the indexer of {kind}. Pass a frequency "
            f"method such as yarn instead of {plan.method}."
        )
    config: Any = text_config(model.config)
    base = config._attn_implementation or "eager"
    if base not in ATTENTION:
        raise UnsupportedModelError(
            f"Expected 'sdpa' or 'eager' attention for {plan.method}, got {base!r} in {kind}. Call "
            "model.set_attn_implementation('sdpa'), then patch."
        )
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"Expected a decoder for {plan.method}, got {model.config.model_type}, which rotates in an encoder as "
            "well. Pass a frequency method such as yarn."
        )
    sites = list(rotary_sites(model))
    backbone, prefix = _backbone(model, sites[0])
    if by_pair and not all(follows_angles(site, plan.target_length) for site in sites):
        raise UnsupportedModelError(
            f"Expected frequencies that are computed once, got {kind}, which computes them in each call. Pass a "
            f"method that maps no rotary pairs, such as rerope, instead of {plan.method}."
        )
    unmapped = Remapping(replace(plan, edits=()), base, delta=indexed)
    if plan.bands and any(getattr(holder, "is_causal", True) is False for holder in (config, backbone.config)):
        raise UnsupportedModelError(both_sides(plan.method, kind, "is_causal=False in its config"))
    dynamic = next((site for site in sites if plan.bands and _follows_length(site)), None)
    if dynamic is not None:
        raise UnsupportedModelError(
            f"Expected frequencies that stay for {plan.method}, got {dynamic.path} of {kind}, where they follow the "
            f"length of the input. Pass a method that fixes them first, as in 'yarn+{plan.method}'."
        )
    whole = Subject(model, "", backbone, sites, False)
    subject = _skeleton(whole, prefix) or whole
    with model_code(kind):
        remapping = _studied(subject, model, plan, unmapped, kind)
    layers = remapping.layers.items()
    refuse_idle(plan, {(layer.window, layer_number(model.get_submodule(path)) or 0) for path, layer in layers})
    _install(whole, remapping, log)
    if hasattr(model, "init_continuous_batching"):
        log.set(model, "__class__", mix(ServesBatches, type(model)))
    return "positions are remapped inside attention"


def _follows_length(site: RotarySite) -> bool:
    """Return whether phases depend on the other positions in a call (two LongRoPE lists, dynamic NTK)."""
    twin = replace(site, module=copy.deepcopy(site.module))
    like = torch.zeros(1, dtype=torch.float32)
    near, far = (own_phases(twin, torch.tensor([[1, last]]), like) for last in (2, FAR))
    return any(not torch.equal(one[..., :1, :], other[..., :1, :]) for one, other in zip(near, far, strict=True))


def _skeleton(whole: Subject, prefix: str) -> Subject | None:
    """Return a skeleton of the backbone of a model as the subject, or `None` if no skeleton can be built."""
    takes_ids = "input_ids" in inspect.signature(whole.backbone.forward).parameters
    inside = all(site.path.startswith(prefix) for site in whole.sites)
    skeleton = skeleton_of(whole.backbone) if takes_ids and inside else None
    if skeleton is None:
        return None
    bones = [replace(site, module=skeleton.get_submodule(site.path[len(prefix) :])) for site in whole.sites]
    return Subject(skeleton, prefix, skeleton, bones, True)


def _studied(
    subject: Subject, model: PreTrainedModel, plan: ExtensionPlan, unmapped: Remapping, kind: str
) -> Remapping:
    """Return the remapping of a model, with layouts that are measured and checked on the subject.

    Raises:
        UnsupportedModelError: see [`apply_late_rotation`].
    """
    root, delta = subject.root, unmapped.delta
    config: Any = text_config(root.config)
    selected = [getattr(config, name, CHECK_TOKENS) for name in SELECTED]
    ids = torch.arange(3, 3 + min(CHECK_TOKENS, *selected), device=root.device)[None] % config.vocab_size
    with evaluation_mode(root):
        layers = _layouts(subject, model, ids, kind)
        unmapped = replace(unmapped, layers=layers)
        modules = dict(model.named_modules())
        if plan.query_scale is not None and plan.query_scale.first_layer > 0:
            unnumbered = [path for path in layers if layer_number(modules[path]) is None]
            if unnumbered:
                raise UnsupportedModelError(
                    f"Expected a layer_idx in each attention layer of {kind}, because {plan.method} skips the first "
                    f"ones, got none in {unnumbered[0]}."
                )
        if plan.bands:
            free = [path for path in layers if not getattr(modules[path], "is_causal", True)]
            if free:
                raise UnsupportedModelError(both_sides(plan.method, kind, free[0]))
        # reference: outputs of the subject with its own rotation
        expected = _states(root, ids)
        doubled = _states(root, ids, 2) if delta else expected
        log = UndoLog()
        try:
            bones = {subject.prefix + path: module for path, module in root.named_modules()}
            arguments = (arguments_read(base_function(unmapped.base, bones[path])) for path in layers)
            refused = frozenset().union(*arguments) - HONOURED
            # the same with late rotation: without bands, then over two bands that leave positions unchanged
            _install(subject, unmapped, log)
            outputs = [(expected, _states(root, ids))]
            if plan.bands:
                two_bands = replace(unmapped.plan, edits=TWO_BANDS)
                outputs.append((expected, _staged(subject, replace(unmapped, plan=two_bands), ids)))
            if delta:  # attention has rotated by nothing so far: also compare with doubled positions
                twice = replace(unmapped.plan, edits=(Band(TWICE, TWICE),))
                outputs.append((doubled, _staged(subject, replace(unmapped, plan=twice), ids)))
            tolerance = torch.max(_tolerance(expected), _tolerance(doubled))
            difference = max((attended - row).float().abs().max() for attended, row in outputs)
            if not difference <= tolerance:
                raise UnsupportedModelError(
                    f"Expected equal outputs of {kind} when its attention rotates late, got a difference of "
                    f"{difference:.1e} where {tolerance:.1e} is allowed: it uses rotated states elsewhere. Pass a "
                    f"frequency method such as yarn instead of {plan.method}."
                )
            late = replace(unmapped, plan=plan, rotates_cached_keys=True, refused=refused)
            return late if _keeps_rotated(subject, late, ids[:, :7]) else replace(late, rotates_cached_keys=False)
        except EvaluationError as error:
            raise UnsupportedModelError(
                f"Expected the keys of all tokens in attention, got others in {kind}, which uses rotated states "
                f"elsewhere. Pass a frequency method such as yarn instead of {plan.method}."
            ) from error
        finally:
            log.undo()


def _states(root: PreTrainedModel, ids: torch.Tensor, stride: int = 1) -> torch.Tensor:
    """Return the first output of a model for tokens at positions 0, stride, ...

    Positions with gaps need a mask, because transformers otherwise takes them for packed documents.
    """
    gaps = {"position_ids": torch.arange(ids.shape[1], device=ids.device)[None] * stride}
    gaps["attention_mask"] = torch.ones_like(ids)
    with torch.no_grad():
        out: torch.Tensor = root(input_ids=ids, use_cache=False, **(gaps if stride > 1 else {}))[0]
    return out


def _staged(subject: Subject, remapping: Remapping, ids: torch.Tensor) -> torch.Tensor:
    _stage(subject, remapping)
    return _states(subject.root, ids)


def _stage(subject: Subject, remapping: Remapping) -> None:
    for module, name, value in _marks(subject, remapping):
        setattr(module, name, value)


def _keeps_rotated(subject: Subject, remapping: Remapping, ids: torch.Tensor) -> bool:
    """Return whether cached keys may stay rotated.

    The plan must rotate at most one cached key per step, and rotations must be invertible. A trial of decoding must
    show that nothing else in the model reads the cached keys, like layers that share their keys would.
    """
    edge = remapping.bands.edge
    if remapping.plan.follows_rows or remapping.delta or edge is None:
        return False
    if not all(layer.key.is_rotation() for layer in remapping.layers.values()):
        return False
    if cache_argument(subject.root.forward) is None:
        return False
    expected = _staged(subject, replace(remapping, rotates_cached_keys=False), ids)[:, -1]
    _stage(subject, remapping)
    cache, first = None, 0
    for last in (ids.shape[1] - 3, *range(ids.shape[1] - 2, ids.shape[1] + 1)):
        with torch.no_grad():
            cache_kwargs = with_cache(subject.root.forward, cache)
            out = subject.root(input_ids=ids[:, first:last], use_cache=True, **cache_kwargs)
        cache, first = cache_of(out), last
        if cache is None:
            return False
    difference = (out[0][:, -1] - expected).float().abs().max()
    return bool(difference <= _tolerance(expected))


def _tolerance(states: torch.Tensor) -> torch.Tensor:
    """Return the tolerance of outputs: float32 changes the order of sums, and half precision rounds states."""
    return (1e-4 if states.dtype in (torch.float32, torch.float64) else 5e-2) * states.float().abs().max()


def _install(subject: Subject, remapping: Remapping | Probing, log: UndoLog) -> None:
    """Install rotary modules that leave the rotation to attention, the attention function, and hooks of forwards."""
    root: Any = subject.root
    backbone: Any = subject.backbone
    for site in subject.sites:
        module = site.module
        sets = {**getattr(module, "_posext_sets", {}), site.layer_type: site.name}
        log.set(module, "_posext_sets", sets)
        if not isinstance(module, RotatesLate):
            log.set(module, "__class__", mix(RotatesLate, type(module)))
            if "_old_forward" in vars(module):  # with a device_map, accelerate calls this stored method
                log.set(module, "_old_forward", type(module).forward.__get__(module))
    # Every module holds the lease, because users may keep a part of the model, whose config names this attention.
    lease = Lease()
    for module in root.modules():
        log.set(module, "_posext_lease", lease)
    for mark in _marks(subject, remapping):
        log.set(*mark)
    log.on_undo(lease.close)
    switch_attention(root, ATTENTION[text_config(root.config)._attn_implementation or "eager"], log)
    if isinstance(remapping, Probing):
        return
    # hooks create a state for each forward of the backbone, and read positions that phases carry to the layers
    log.set(backbone, "_posext_arguments", tuple(inspect.signature(backbone.forward).parameters))
    log.set(backbone, "_posext_text_config", text_config(backbone.config))
    handles = [
        backbone.register_forward_pre_hook(begin_forward, with_kwargs=True),
        backbone.register_forward_hook(end_forward, with_kwargs=True, always_call=True),
    ]
    modules = {subject.prefix + path: module for path, module in root.named_modules()}
    handles += [modules[path].register_forward_pre_hook(begin_layer, with_kwargs=True) for path in remapping.layers]
    for handle in handles:
        log.on_undo(handle.remove)


def _marks(subject: Subject, remapping: Remapping | Probing) -> Iterator[tuple[nn.Module, str, Any]]:
    """Yield the attributes that modules of a subject have under a remapping: module, name, and value."""
    for path, module in subject.root.named_modules():
        path = subject.prefix + path
        yield module, "_posext_remapping", remapping
        if isinstance(remapping, Probing):
            yield module, "_posext_path", path
        elif path in remapping.layers:
            layer, scale = remapping.layers[path], remapping.plan.query_scale
            scale = None if scale is None or scale.first_layer > (layer_number(module) or 0) else scale
            near, base = remapping.bands.sees_one(layer.window), base_function(remapping.base, module)
            index: Any = getattr(module, "layer_idx", None)
            yield module, "_posext_layer", replace(layer, near=near, scale=scale, base=base, index=index)


def _backbone(model: PreTrainedModel, site: RotarySite) -> tuple[PreTrainedModel, str]:
    """Return the innermost transformers model that contains the rotary module, and the path prefix of its modules.

    This model receives the cache.
    """
    holders: Iterable[tuple[str, nn.Module]] = (
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, PreTrainedModel)
        and (site.path == path or site.path.startswith(f"{path}." if path else ""))
    )
    path, backbone = max(holders, key=lambda holder: len(holder[0]))
    assert isinstance(backbone, PreTrainedModel)
    return backbone, f"{path}." if path else ""


def _layouts(subject: Subject, model: PreTrainedModel, ids: torch.Tensor, kind: str) -> dict[str, Layer]:
    """Return every layer that rotates, with its measured layout and sliding window.

    Raises:
        UnsupportedModelError: attention cannot be reached, no layer rotates, or a layer has no layout.
    """
    sites = {site.name: site for site in reversed(subject.sites)}
    backbone = model.get_submodule(subject.prefix.removesuffix("."))

    def probe(quarters: Quarters, text: torch.Tensor) -> Probing:
        probing = Probing(quarters)
        log = UndoLog()
        try:
            _install(subject, probing, log)
            _states(subject.root, text.expand(len(next(iter(quarters.values()))), -1))
        finally:
            log.undo()
        if not probing.captured:
            raise UnsupportedModelError(
                f"Expected attention through transformers' AttentionInterface, got none in {kind}. Pass a frequency "
                "method such as yarn."
            )
        return probing

    def groups(site: RotarySite) -> torch.Tensor:
        """Return the pair of each slot. Slots with equal phases at a few odd positions belong to one pair."""
        positions = torch.tensor([[1, 7, 31, 101, 997, 4001]], device=ids.device)
        cos, sin = own_phases(site, positions, torch.zeros(1, dtype=torch.float32, device=ids.device))
        signature = torch.cat([cos.flatten(0, -2), sin.flatten(0, -2)]).T.double()
        pairs: torch.Tensor = torch.unique(signature, dim=0, return_inverse=True)[1]
        return pairs.cpu()

    pairs = {name: groups(site) for name, site in sites.items()}
    few = ids[:, :5]
    try:
        layers = measure(lambda quarters: probe(quarters, few).captured, pairs)
        weighted = [path for path, layout in layers.items() if not layout.is_plain()]
        if weighted and subject.bare:  # a norm after the rotation: measure again with the model's weights
            bones = [path[len(subject.prefix) :] for path in weighted]
            if not copy_norms(subject.root, backbone, bones):  # type: ignore[arg-type]
                raise UnknownLayout(f"{weighted[0]} weighs its channels behind the rotation by weights out of reach")
            layers = measure(lambda quarters: probe(quarters, few).captured, pairs)
    except UnknownLayout as error:
        raise UnsupportedModelError(
            f"Expected queries and keys that rotate in pairs of channels, got {kind}: {error}. Pass a frequency "
            "method such as yarn."
        ) from error
    if not layers:
        raise UnsupportedModelError(f"Expected an attention layer that rotates, got none in {kind}.")
    measured = probe({name: torch.zeros(1, len(slots)) for name, slots in pairs.items()}, ids).windows
    full = getattr(backbone.config, "sliding_window", None)  # the skeleton's window is smaller
    windows = {path: full if subject.bare and measured[path] == WINDOW else measured[path] for path in layers}
    if not subject.bare or ids.shape[-1] <= WINDOW:  # the text is too short to show the window of the model
        windows = {path: window or claimed_window(model.get_submodule(path)) for path, window in windows.items()}
    return {path: replace(layer, window=windows[path]) for path, layer in layers.items()}
