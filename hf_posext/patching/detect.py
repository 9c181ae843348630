"""Detection of the positional scheme, from a model or from its config alone."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto import modeling_auto

from ..errors import PosExtError, UnsupportedModelError
from ..scheme import PositionalScheme, Rotary
from .modes import replaced_attention
from .remap.layout import WINDOW, Probing, skeleton_of
from .saved_config import saved_plan, without_stop
from .sites import (
    LENGTH_FIELDS,
    OBSTACLES,
    alibi_slopes,
    bucket_modules,
    has_alibi,
    holders,
    makes_windows,
    position_tables,
    positions_ahead,
    probe_text,
    read_buckets,
    read_table,
    sinusoids,
)
from .undo import mark_of, plain_class, unwrap

SHOWN = WINDOW + 8
"""Tokens of a text that shows the windows of a skeleton."""


@dataclass(frozen=True)
class RotarySite:
    """Place of one set of frequencies: a rotary module and the prefix of its attributes.

    The name is the layer type, or begins with the path of a module with a config of its own (Granite SWA: one for each
    base; an encoder).
    """

    path: str
    module: nn.Module
    name: str
    layer_type: str

    @property
    def prefix(self) -> str:
        """Text before `inv_freq` in the names of the module's attributes."""
        return f"{self.layer_type}_" if self.layer_type else ""

    def run(self, positions: torch.Tensor) -> Any:
        """Return the output of the module at positions (n,). Some modules keep the longest input (dynamic NTK)."""
        device = getattr(self.module, f"{self.prefix}inv_freq").device
        parameters = inspect.signature(self.module.forward).parameters
        extra = {"layer_type": self.layer_type} if self.layer_type and "layer_type" in parameters else {}
        with torch.inference_mode(), model_code(f"{type(self.module).__name__} ({self.path})"):
            return self.module(
                torch.zeros(1, 1, 1, dtype=torch.float32, device=device), positions[None].to(device), **extra
            )

    def phases(self, positions: torch.Tensor) -> torch.Tensor:
        """Return cosine and sine (or the complex phase) of the module at positions (n,), float32 of shape (n, ...).

        The module stays as it was.
        """
        state, buffers = vars(self.module).copy(), self.module._buffers.copy()
        try:
            out = self.run(positions)
        finally:
            vars(self.module).update(state)
            self.module._buffers.update(buffers)
        parts = [torch.view_as_real(t) if t.is_complex() else t for t in (out if isinstance(out, tuple) else (out,))]
        return torch.cat([part.float().cpu().reshape(len(positions), -1) for part in parts], dim=-1)


@contextmanager
def model_code(name: str) -> Iterator[None]:
    """Convert errors of a model's own code into an `UnsupportedModelError`."""
    try:
        yield
    except PosExtError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"Expected the positions of {name}, got {type(error).__name__} from its code: {error}. Check that the "
            "model runs on a short text, and report its model type."
        ) from error


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the config of the text decoder: the config itself, or a part of it in multimodal models."""
    return config.get_text_config(decoder=True)


def encoder_config(model: PreTrainedModel) -> PreTrainedConfig | None:
    """Return the config of the text in an encoder, which may be of another class than that of the decoder."""
    encoder = model.get_encoder() if model.config.is_encoder_decoder else None
    if not isinstance(encoder, PreTrainedModel) or encoder.main_input_name != "input_ids":
        return None
    return text_config(encoder.config)


def model_kind(model: nn.Module | PreTrainedConfig) -> tuple[str, str]:
    """Return the kind of a language model or config, also inside a wrapper, and the name of its class.

    The kind is `"masked"` for an encoder with a masked-LM head, `"seq2seq"` for an encoder-decoder with a head, else
    `"causal"`.
    """
    if isinstance(model, PreTrainedConfig):
        config, classes = model, model.architectures or [model.model_type]
    else:
        base = unwrap(model)
        config, classes = base.config, [cls.__name__ for cls in type(base).__mro__]
    kind, heads = "masked", modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if getattr(config, "is_encoder_decoder", False):
        kind, heads = "seq2seq", modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    named = {name for names in heads.values() for name in ([names] if isinstance(names, str) else names)}
    # XLM and Flaubert have one class for both heads, and a config that states which it is
    causal = named.isdisjoint(classes) or (kind == "masked" and getattr(config, "causal", False))
    return "causal" if causal else kind, classes[0]


def rotary_sites(model: PreTrainedModel) -> list[RotarySite]:
    """Return every set of rotary frequencies in the text part of a model, a text encoder included."""
    config, sites = text_config(model.config), []
    kinds = {plain_class(part) for part in (config, encoder_config(model)) if part is not None}
    for path, module in model.named_modules():
        its_config: Any = getattr(module, "config", None)
        if its_config is not model.config and plain_class(its_config) not in kinds:
            continue
        for attribute in sorted({*module._buffers, *vars(module)}):
            if not attribute.endswith("inv_freq") or attribute.endswith(("original_inv_freq", "long_inv_freq")):
                continue
            if isinstance(getattr(module, attribute), torch.Tensor):
                layer_type = attribute.removesuffix("inv_freq").removesuffix("_")
                shared = its_config is config or its_config is model.config
                elsewhere = f"{path}.{layer_type}" if layer_type else path
                sites.append(RotarySite(path, module, layer_type if shared else elsewhere, layer_type))
    # MusicFlamingo rotates its audio by timestamps, in a module with the config of the whole model: where some modules
    # take positions of tokens, the others are not of text
    of_text = [site for site in sites if "position_ids" in inspect.signature(site.module.forward).parameters]
    return of_text or sites


def detect_scheme(model_or_config: nn.Module | PreTrainedConfig) -> PositionalScheme:
    """Return the positional encoding of a model as shipped, even while a patch is in force.

    Args:
        model_or_config (`PreTrainedModel` or `PreTrainedConfig`): a config is enough; no weights of its size are made
            then.

    Raises:
        UnsupportedModelError: neither of the two, or a config of which transformers can build no model.
    """
    with torch.device("cpu"):  # whatever the default device of the process is
        if isinstance(model_or_config, PreTrainedConfig):
            with model_code(f"config type {model_or_config.model_type!r}"):
                return _scheme(_skeleton(model_or_config))
        model = unwrap(model_or_config)
        in_force = mark_of(model)
        if in_force is not None:
            return in_force.plan.scheme
        with model_code(type(model).__name__):
            return _scheme(model)


def _skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """Build the modules of a model on the meta device, without numbers."""
    import transformers

    config = without_stop(config)
    names = [*(config.architectures or []), modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)]
    names.append(modeling_auto.MODEL_MAPPING_NAMES.get(config.model_type))
    flat = [n for name in names for n in (name if isinstance(name, tuple | list) else [name])]
    cls = next((getattr(transformers, name) for name in flat if name and hasattr(transformers, name)), None)
    if cls is None:
        raise UnsupportedModelError(
            f"Expected a config of a model in transformers, got type {config.model_type!r}. Pass the loaded model."
        )
    expected = cls.config_class if cls.config_class is not None else type(config)
    with torch.device("meta"):
        return cls(copy.deepcopy(config if isinstance(config, expected) else text_config(config)))


def _scheme(model: PreTrainedModel) -> PositionalScheme:
    config = text_config(model.config)
    sites: dict[str, RotarySite] = {}
    for site in rotary_sites(model):
        sites.setdefault(site.name, site)
    kind, obstacle = _kind(model, config, bool(sites))
    rotaries: list[Rotary] = []
    for site in sites.values() if kind == "rotary" else ():
        rotary = _rotary(model, site)
        if rotary is None:
            obstacle = (
                f"{config.model_type} has frequencies in {site.path} that do not follow theta ** (-2i/d); "
                "hf_posext cannot change them"
            )
        else:
            rotaries.append(rotary)
    table, no_table = read_table(model) if kind == "learned" and position_tables(model) else (None, None)
    buckets, no_buckets = read_buckets(model) if kind != "rotary" and bucket_modules(model) else (None, None)
    if no_table or (no_buckets and kind == "relative"):
        obstacle = f"{config.model_type} cannot be changed: {no_table or no_buckets}"
    taken = inspect.signature(model.forward).parameters
    if model.main_input_name != "input_ids" and not {"input_ids", "decoder_input_ids"} & taken.keys():
        obstacle = f"{config.model_type} cannot be changed: it reads no text"
    trained, source, shipped = _lengths(config, rotaries)
    encoder = encoder_config(model) if kind == "rotary" else None
    lengths = [_lengths(part, [])[0] for part in (config, encoder) if part is not None]
    if len(set(lengths)) > 1:
        obstacle = (
            f"{config.model_type} cannot be changed: its decoder states {lengths[0]} tokens, its encoder "
            f"{lengths[1]}, and a plan has one trained length"
        )
    if table is not None:
        trained = shipped = table.usable - positions_ahead(model)
        source = "positions in the learned table"
    saved = saved_plan(model.config)
    if saved is not None:
        trained, source = saved.trained_length, "the plan under which the model was saved"
    return PositionalScheme(
        kind,
        config.model_type,
        trained,
        source,
        shipped,
        tuple(rotaries),
        layer_types=tuple(dict.fromkeys(getattr(config, "layer_types", None) or ())),
        obstacle=obstacle,
        table=table,
        slopes=alibi_slopes(model) if kind == "alibi" else (),
        buckets=buckets,
    )


def _rotary(model: PreTrainedModel, site: RotarySite) -> Rotary | None:
    """Return one set of frequencies before any scaling, or `None` where it follows no base."""
    config: Any = getattr(site.module, "config")  # noqa: B009  nn.Module types its attributes as tensors
    parameters = dict(getattr(config, "rope_parameters", None) or {})
    if site.layer_type:
        parameters = dict(parameters.get(site.layer_type) or {})
    slots = getattr(site.module, f"{site.prefix}inv_freq").numel()
    theta = float(parameters.get("rope_theta") or getattr(config, "rope_theta", None) or 10_000.0)
    # a layer type states a window, which binds where the file of the model makes masks for one
    window = None
    if makes_windows(site.module):
        window = _window(config, site.layer_type) if site.layer_type else _farthest(model, site)
    if parameters.get("rope_type") == "proportional":
        pairs = int(float(parameters.get("partial_rotary_factor", 1.0)) * slots)
        return Rotary(site.name, theta, 2 * slots, pairs, slots, window, parameters)
    default = _default_frequencies(site, config)
    for dim in (2 * slots, 2 * slots - 1):
        formula = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        if default is not None and len(default) == slots and torch.allclose(formula, default, rtol=1e-6, atol=0):
            return Rotary(site.name, theta, dim, slots, slots, window, parameters)
    return None


def _default_frequencies(site: RotarySite, config: Any) -> torch.Tensor | None:
    """Return the unscaled frequencies of transformers, or the module's own if it has no function for them."""
    compute: Any = getattr(site.module, "compute_default_rope_parameters", None)
    if compute is not None:
        with torch.device("cpu"):
            if site.layer_type and getattr(config, "is_heterogeneous", False):  # Gemma-4, Dots-3: widths by layer type
                config = config.per_layer_config[config.layer_types.index(site.layer_type)]
            extra = {"layer_type": site.layer_type} if site.layer_type else {}
            frequencies: torch.Tensor = compute(config, **extra)[0]
            if len(frequencies) == getattr(site.module, f"{site.prefix}inv_freq").numel():
                return frequencies
            # Mistral 4: that function ignores that only a part of a head rotates; transformers' rope types do not
            unscaled = copy.deepcopy(config)
            holder = unscaled.rope_parameters[site.layer_type] if site.layer_type else unscaled.rope_parameters
            holder |= {"rope_type": "linear", "factor": 1.0}
            frequencies = ROPE_INIT_FUNCTIONS["linear"](unscaled, "cpu", **extra)[0]
            return frequencies
    own: torch.Tensor = getattr(site.module, f"{site.prefix}inv_freq")
    return None if own.is_meta else own.detach().float().cpu()


def _window(config: Any, layer_type: str) -> int | None:
    """Return the farthest distance that layers of a set see, where the name of the set says that it is bounded."""
    if "sliding" not in layer_type:
        return getattr(config, "attention_chunk_size", None) if "chunked" in layer_type else None
    if not getattr(config, "is_heterogeneous", False):
        return getattr(config, "sliding_window", None)
    layers = [index for index, kind in enumerate(config.layer_types) if kind == layer_type]
    windows = [config.per_layer_config[index].sliding_window for index in layers]  # NeoMME: some of them are None
    return None if None in windows else max(windows)


def _farthest(model: PreTrainedModel, site: RotarySite) -> int | None:
    """Return the farthest distance that layers which rotate see, for layers that share a set of frequencies.

    In Cohere 2, EXAONE 4, and Mistral with a window, no layer that rotates sees beyond the window. No attribute says
    so in all of them. A layer of a skeleton rotates if its keys follow the positions, and its mask shows its window.
    """
    backbone = holders(model, site.path)[0]
    window: int | None = getattr(backbone.config, "sliding_window", None)
    if window is None or "position_ids" not in inspect.signature(backbone.forward).parameters:
        return None
    skeleton = skeleton_of(backbone)
    if skeleton is None:
        return None
    paths = {module: path for path, module in skeleton.named_modules()}
    runs = [Probing({}) for _ in range(2)]
    for stride, run in enumerate(runs, 1):

        def attend(module: nn.Module, query: Any, key: Any, value: Any, attention_mask: Any = None, **_: Any) -> Any:
            return run.capture(paths[module], query, key, value, attention_mask)  # noqa: B023  runs before the next one

        # positions with gaps need a mask: without one, they begin other documents
        inputs = {"input_ids": probe_text(skeleton, SHOWN), "position_ids": stride * torch.arange(SHOWN)[None]}
        try:
            with replaced_attention(skeleton, "posext-windows", attend), torch.no_grad():
                skeleton(**inputs, attention_mask=torch.ones(1, SHOWN), use_cache=False)
        except Exception:  # it wants more than text (the decoder of T5Gemma)
            return None
    keys = [{path: states[1] for path, states in run.captured.items()} for run in runs]
    rotating = [path for path in keys[0] if not torch.equal(keys[0][path], keys[1][path])]
    # the window of the skeleton is smaller, to show in a short text
    inside = rotating and all(runs[0].windows[path] == min(window, WINDOW) for path in rotating)
    return window if inside else None


def _lengths(config: PreTrainedConfig, rotaries: list[Rotary]) -> tuple[int | None, str, int | None]:
    """Return the trained length, its source, and the length that the model as shipped claims."""
    limits = {name: getattr(config, name, None) for name in LENGTH_FIELDS}
    field, limit = next(((name, value) for name, value in limits.items() if value and value > 0), ("", None))
    if limit is None:
        return None, "the config does not contain the trained length", None
    scaled = next((rotary for rotary in rotaries if rotary.shipped_type not in ("default", "proportional")), None)
    if scaled is None:
        return limit, f"{field} of the config", limit
    factor = float(scaled.shipped.get("factor") or 1.0)
    original = getattr(config, "original_max_position_embeddings", None) or scaled.shipped.get(
        "original_max_position_embeddings"
    )
    if original:
        claimed = round(original * factor) if scaled.shipped_type != "longrope" else limit
        return int(original), f"original_max_position_embeddings ({scaled.shipped_type})", max(limit, claimed)
    if scaled.shipped_type == "linear":
        return round(limit / factor), f"max_position_embeddings / {factor:g} (linear scaling shipped)", limit
    return limit, "max_position_embeddings of the config", round(limit * factor)


def _kind(model: PreTrainedModel, config: PreTrainedConfig, rotates: bool) -> tuple[str, str | None]:
    """Return the kind of a scheme, from the modules of the model, and why it cannot be changed."""
    family = config.model_type
    if family in OBSTACLES:
        kind, reason = OBSTACLES[family]
        return kind, f"{family} cannot be changed: {reason}"
    if has_alibi(model):  # before rotary: Falcon has rotary modules in either case
        return "alibi", None
    if rotates:
        return "rotary", None
    for kind, modules_of in (("sinusoidal", sinusoids), ("learned", position_tables), ("relative", bucket_modules)):
        if modules_of(model):
            return kind, None
    if getattr(config, "relative_attention", False):
        return "relative", f"{family} cannot be changed: its attention is relative by itself (disentangled)"
    return "none", None
