"""Frequencies of a live model: its rotary modules, and the matching entries of its config.

The numbers come from the plan. Whether transformers itself would compute the same ones from the plan's
`rope_parameters` is measured, by building the rotary module anew from the changed config and comparing phases; only
then is the config changed, and only then does a saved checkpoint open without this package.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..errors import UnsupportedModelError
from ..plan import ExtensionPlan, RotaryPlan
from .detect import RotarySite, rotary_sites
from .effect import no_effect
from .undo import Mixin, UndoLog, mix, source_file

logger = logging.get_logger(__name__)


class KeepsFrequencies(Mixin):
    """Mixin for a patched rotary module that keeps frequencies float32 when the model is cast.

    `model.to(torch.bfloat16)` would round them by 4e-3, which is whole turns at a few thousand tokens.
    """

    _posext_frequencies: dict[str, tuple[float, ...]]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> KeepsFrequencies:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, numbers in self._posext_frequencies.items():
            setattr(self, name, _frequencies(numbers, getattr(self, name).device))
        return self


def _frequencies(numbers: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Return frequencies that `model.apply(model._init_weights)` leaves, although no config may express them."""
    frequencies = torch.tensor(numbers, dtype=torch.float32, device=device)
    frequencies._is_hf_initialized = True  # type: ignore[attr-defined]
    return frequencies


@dataclass(frozen=True)
class FixedFrequencies:
    """Replacement for the function with which PhiMoE recomputes its frequencies in every forward."""

    inv_freq: tuple[float, ...]
    attention_factor: float

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, float]:
        return torch.tensor(self.inv_freq, dtype=torch.float32), self.attention_factor


def apply_frequencies(model: PreTrainedModel, plan: ExtensionPlan, log: UndoLog) -> str | None:
    """Apply the frequencies of a plan, and check that phases changed or follow the row length.

    Returns:
        `str`, *optional*: why the config cannot state them; `None` where it does.
    """
    planned = {entry.name: entry for entry in plan.rotaries}
    sites = [site for site in rotary_sites(model) if site.name in planned]
    probes = _probe_positions(plan)
    before = [[site.phases(probe) for probe in probes] for site in sites]

    obstacle = "positions are remapped inside attention" if plan.rotates_late else None
    obstacle = obstacle or _say_in_config(sites, planned, plan, log)
    _rescale_softmax(model, plan, log)
    if obstacle and any(entry.short_inv_freq is not None for entry in plan.rotaries):
        raise UnsupportedModelError(
            f"Expected a model with a longrope of its own for the two factor lists of {plan.method}, but {obstacle}. "
            "Pass one list."
        )
    for site in sites:
        _write(site, planned[site.name], log)

    for site in sites:  # at position 0 cosines are 1, times the factor, which float32 may round to 1
        factor = planned[site.name].attention_factor
        if torch.tensor(factor, dtype=torch.float32) != 1.0 and site.phases(torch.tensor([0])).max() == 1:
            raise UnsupportedModelError(
                f"Expected {site.path} ({type(site.module).__name__}) to multiply its phases by {factor:g} for "
                f"{plan.method}, got phases without a factor. Pass attention_factor=1.0."
            )
    after = [[site.phases(probe) for probe in probes] for site in sites]
    for site, old, new in zip(sites, before, after, strict=True):
        same = (_same_phases(a, b, probe) for a, b, probe in zip(old, new, probes, strict=True))
        growth = planned[site.name].growth
        if not (growth and growth.acts) and all(same):
            raise no_effect(plan, f"the phases of {site.path}")
    if any(entry.short_inv_freq is not None for entry in plan.rotaries):
        hook = functools.partial(_watch_boundary, plan.trained_length)
        log.on_undo(model.base_model.register_forward_pre_hook(hook, with_kwargs=True).remove)
    return obstacle


def _watch_boundary(boundary: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Warn when a model with two LongRoPE lists switches to the second one with cached keys of the first."""
    values = (*args, *kwargs.values())
    cache = next((value for value in values if hasattr(value, "get_seq_length")), None)
    read = next((value for value in values if isinstance(value, torch.Tensor)), None)
    past = 0 if cache is None else cache.get_seq_length()
    # a static cache counts on its device, for which the host does not wait
    if read is not None and isinstance(past, int) and 0 < past <= boundary < past + read.shape[1]:
        logger.warning_once(
            "a text has passed %d tokens, where this model takes its second LongRoPE list, and the keys in its cache "
            "are rotated by the first. What follows differs from a forward of the whole text, as in transformers. "
            "Read the text anew to avoid it",
            boundary,
        )


def _probe_positions(plan: ExtensionPlan) -> list[torch.Tensor]:
    """Return positions to compare phases at: of an input of the trained length, and of one of the target length."""
    short, long = plan.trained_length, max(plan.target_length, plan.trained_length + 1)
    return [torch.tensor(sorted({1, 2, 3, last // 3, last // 2, last - 1})) for last in (short, long)]


def _same_phases(before: torch.Tensor, after: torch.Tensor, positions: torch.Tensor) -> bool:
    """Return whether phases are equal, except for the rounding of frequencies, which positions multiply.

    YaRN at factor 1 computes the frequencies of the model by other operations.
    """
    rounding = 4 * torch.finfo(torch.float32).eps
    return bool(((after - before).abs() <= rounding * (1 + positions[:, None])).all())


def _write(site: RotarySite, entry: RotaryPlan, log: UndoLog) -> None:
    """Write the numbers of one set into its module."""
    module, prefix = site.module, site.prefix
    short = entry.short_inv_freq or entry.inv_freq
    numbers = {f"{prefix}inv_freq": short, f"{prefix}original_inv_freq": short}
    if entry.short_inv_freq is not None:
        numbers[f"{prefix}long_inv_freq"] = entry.inv_freq
    device = getattr(module, f"{prefix}inv_freq").device
    for name, values in numbers.items():
        put = log.replace if name in module._buffers else log.set
        put(module, name, _frequencies(values, device))
    scaling = getattr(module, f"{prefix}attention_scaling", None)
    if scaling is not None:
        log.set(module, f"{prefix}attention_scaling", entry.attention_factor)
    elif entry.attention_factor != 1.0:
        raise UnsupportedModelError(
            f"Expected {site.path} ({type(module).__name__}) to multiply its phases by {entry.attention_factor:g}, "
            "got a module without attention scaling. Pass attention_factor=1.0."
        )
    if hasattr(module, "rope_type"):
        rope_type = "longrope" if entry.short_inv_freq is not None else "default"
        nested = {**module.rope_type, site.layer_type: rope_type} if isinstance(module.rope_type, dict) else rope_type
        log.set(module, "rope_type", nested)
    if "rope_init_fn" in vars(module):
        log.set(module, "rope_init_fn", FixedFrequencies(entry.inv_freq, entry.attention_factor))
    # every set of a module with several is kept; the two names that transformers itself overwrites are among them
    kept = {**getattr(module, "_posext_frequencies", {}), **numbers}
    log.set(module, "_posext_frequencies", kept)
    if not isinstance(module, KeepsFrequencies):
        log.set(module, "__class__", mix(KeepsFrequencies, type(module)))


def _say_in_config(
    sites: list[RotarySite],
    planned: dict[str, RotaryPlan],
    plan: ExtensionPlan,
    log: UndoLog,
) -> str | None:
    """Write `rope_parameters` if transformers computes the plan's numbers from them; else return why not."""
    config: Any = sites[0].module.config
    changed: dict[str, Any] = {}
    if any(entry.rope_parameters is None for entry in plan.rotaries):
        obstacle: str | None = f"no rope type of transformers can express the frequencies of {plan.method}"
    elif getattr(config, "rope_parameters", None) is None:
        obstacle = f"the config of {plan.scheme.model_type} has no rope_parameters, which transformers reads"
    elif any(site.module.config is not config for site in sites):
        obstacle = f"{plan.scheme.model_type} keeps several bases, each in a config of its own"
    else:
        candidate = _with_parameters(config, planned, plan)
        obstacle = _differs(sites[0].module, candidate, planned, plan)
        changed = {} if obstacle else candidate.rope_parameters
    if obstacle:
        logger.info("%s: %s; the config keeps its shipped rope_parameters", plan.scheme.model_type, obstacle)
        return obstacle
    log.set(config, "rope_parameters", changed)
    if getattr(config, "original_max_position_embeddings", None) is not None:
        log.set(config, "original_max_position_embeddings", plan.trained_length)
    return None


def _with_parameters(config: Any, planned: dict[str, RotaryPlan], plan: ExtensionPlan) -> Any:
    """Return a copy of a config that requests the plan's frequencies."""
    changed = copy.deepcopy(config)
    for name, entry in planned.items():
        parameters = dict(entry.rope_parameters or {})
        if config.model_type == "phimoe" and parameters["rope_type"] != "default":
            # its forward takes the temperature from these, whatever the rope type
            parameters |= {"short_mscale": entry.attention_factor, "long_mscale": entry.attention_factor}
            parameters["original_max_position_embeddings"] = plan.trained_length
        if name:
            changed.rope_parameters = {**changed.rope_parameters, name: parameters}
        else:
            changed.rope_parameters = parameters
    if getattr(changed, "original_max_position_embeddings", None) is not None:
        changed.original_max_position_embeddings = plan.trained_length
    if getattr(changed, "max_position_embeddings", None) is not None:  # recurrent_gemma names no limit
        changed.max_position_embeddings = max(changed.max_position_embeddings, plan.target_length)
    return changed


def _differs(module: nn.Module, candidate: Any, planned: dict[str, RotaryPlan], plan: ExtensionPlan) -> str | None:
    """Return why a module built from the candidate config does not compute the plan's phases."""
    try:
        native = type(module)(candidate)
    except (KeyError, ValueError, TypeError, RuntimeError, AttributeError, IndexError) as error:
        return f"{type(module).__name__} refuses the config ({type(error).__name__}: {error})"
    twin = copy.deepcopy(module).to("cpu")
    twin.config = candidate
    for name, entry in planned.items():
        _write(RotarySite("", twin, name, name), entry, UndoLog())
    for name in planned:
        for probe in _probe_positions(plan):
            try:
                said = RotarySite("", native, name, name).phases(probe)
            except (KeyError, RuntimeError) as error:
                return f"{type(module).__name__} cannot run from the config ({type(error).__name__}: {error})"
            if not torch.equal(said, RotarySite("", twin, name, name).phases(probe)):
                return f"{type(module).__name__} computes other phases from the config than the plan has"
    return None


def _rescale_softmax(model: PreTrainedModel, plan: ExtensionPlan, log: UndoLog) -> None:
    """Replace the temperature of a shipped YaRN that the DeepSeek family bakes into `scaling` of attention layers.

    That of the plan is in its `rope_parameters`, also where the config does not state them.

    Raises:
        UnsupportedModelError: the plan has a temperature, but no `rope_parameters` to contain it.
    """
    entry = next((entry for entry in plan.rotaries if entry.name == ""), None)  # a family of one set of frequencies
    if entry is None:
        return
    shipped, planned = plan.scheme.rotary("").shipped, entry.rope_parameters
    sharpens = any(component["name"] == "yarn" for component in plan.parameters)  # the one method with such keys
    for module in model.modules():
        bake = _baking(type(module)) if isinstance(getattr(module, "scaling", None), float) else None
        before = 1.0 if bake is None else bake(shipped, 1.0)
        if bake is None or before == bake(planned or {}, 1.0):
            continue
        if planned is None and (sharpens or (entry.growth and entry.growth.temperature)):
            raise UnsupportedModelError(
                f"Expected a method that leaves a constant temperature to {plan.scheme.model_type}, which multiplies "
                f"that of its YaRN into the scale of the softmax, got {plan.method}. Pass yarn without a method that "
                "no rope type can express, or dynamic-yarn(temperature=0)."
            )
        log.set(module, "scaling", bake(planned or {}, module.scaling / before))


def _baking(kind: type[nn.Module]) -> Callable[[Any, float], float] | None:
    """Return the attention class's function `(rope parameters, softmax scale) -> softmax scale`, if any."""
    source = source_file(kind)
    apply_mscale: Callable[[Any, float], float] | None = getattr(source, "yarn_apply_mscale", None)
    if apply_mscale is not None:
        return apply_mscale
    # Older versions of transformers have no such function. Their constructors do the same in place.
    constructor = getattr(inspect.unwrap(kind.__init__), "__code__", None)
    if constructor is None or "yarn_get_mscale" not in constructor.co_names:
        return None

    def in_place(parameters: Any, scaling: float) -> float:
        all_dim = parameters.get("mscale_all_dim", 0)
        if parameters.get("rope_type", "default") == "default" or not all_dim:
            return scaling
        mscale: float = source.yarn_get_mscale(parameters["factor"], all_dim)
        return scaling * mscale * mscale

    return in_place


def forget_length(model: PreTrainedModel) -> None:
    """Reset transformers' dynamic NTK scaling to its initial state.

    Its rotary modules keep the frequencies of the longest input so far, until one is within the trained length. What a
    text gives would depend on what was read before it.
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
