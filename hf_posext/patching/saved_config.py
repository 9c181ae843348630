"""Config of a patched model as it is written: its plan, and entries for readers that do not know plans.

`Trainer.save_model`, `save_pretrained` of transformers and PEFT, `push_to_hub` and TRL know nothing of plans. All of
them write the config of the model, and PEFT writes that of the adapter. A patch therefore puts its plan into both.

A reader that knows no plans either computes the same positions from the config, or has to stop. Every model of
transformers 5 refuses an unknown implementation of its attention or experts when it is built, and the message quotes
the name. Servers refuse an unknown rope type in the same way, and PEFT an unknown `peft_type`. These entries therefore
contain a sentence that names the plan. The replaced values are kept beside the plan, and [`without_stop`] restores
them. Code that reads the config alone, such as a tokenizer, is not stopped.

transformers 5 writes `rope_parameters`. transformers 4 ignores that entry and computes the positions of a plain model.
It reads `rope_scaling` and `rope_theta`, as the converters of ollama and MLX do. One config can contain both dialects.
Version 5 prefers `rope_scaling`, so that both have to be right. If they cannot coexist, or version 4 would compute
other positions from them, `pruned_heads` contains the sentence: version 4 expects numbers there and stops, and
version 5 ignores the entry. Facts about version 4 are from 4.57.6, its last: `configuration_utils.py`,
`modeling_rope_utils.py`, `models/*/modeling_*.py`.

The config of an adapter also contains the identity of its base model: a few numbers of a few weights that no adapter
layer holds. They survive a change of dtype to within its rounding, and a model that was trained further has others.
"""

from __future__ import annotations

import copy
import inspect
import json
import math
import re
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel

from ..decode import decode
from ..errors import CheckpointError, PlanError, TrainingError, UnsupportedModelError
from ..plan import PLAN_KEY, ExtensionPlan, has_plan
from .sites import path_without_adapter, position_tables, text_configs
from .tables import length_fields
from .undo import MARK, Carried, InForce, mark_of, mix, unwrap
from .untrusted import read_json

REPLACED_KEY = "posext_replaced"
"""Entry of a config that contains what stood where its readers are stopped."""

LIMITS_KEY = "posext_limits"
"""Entry of a config that contains the values of the limits that a patch raised."""

_EXPERTS = "experts_implementation"
_IMPLEMENTATIONS = ("attn_implementation", _EXPERTS)

_STOP_4 = "pruned_heads"
"""Entry of a config in which transformers 4 accepts numbers alone, and that transformers 5 does not know."""

LEAST = "4.57"

TYPES = ("default", "linear", "yarn", "llama3", "longrope")

FAMILIES = frozenset(
    "apertus arcee aria_text bitnet cohere cohere2 dots1 emu3_text_model ernie4_5 ernie4_5_moe flex_olmo "
    "gemma gemma2 granite granitemoe granitemoeshared helium jetmoe llama ministral mistral mixtral nemotron "
    "olmoe qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 starcoder2 vaultgemma".split()
)
"""Model types whose config takes every rope type there, and whose rotary module reads all of it for the whole head."""

UNREADABLE = ("yarn", "llama3", "longrope")
"""Types whose `rope_scaling` transformers 5 cannot read as the config of no model, for want of a length in it."""

_CHECKPOINT = re.compile(r"checkpoint-\d+")
"""Directories from which `Trainer` resumes. It reads their config as the config of no model."""


def _sentence(plan: ExtensionPlan | Mapping[str, Any]) -> str:
    plan = plan if isinstance(plan, ExtensionPlan) else ExtensionPlan.from_dict(plan)
    return f"hf_posext plan ({plan.describe()})"


def _unbuildable(plan: ExtensionPlan | Mapping[str, Any]) -> str:
    return f"{_sentence(plan)}; copy the model, or patch one that is built from an unpatched config"


@contextmanager
def edited(path: Path) -> Iterator[dict[str, Any]]:
    """Read the entries of a JSON file, and write them when the block has changed them."""
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    yield data
    path.write_text(json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


class CarriesPlan(Carried):
    """Mixin for the config of a patched model."""

    def to_dict(self) -> dict[str, Any]:
        """Return the entries of the config. Those of its parts contain the plan where a part is written alone."""
        data: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        for part in data.values():
            if isinstance(part, dict) and PLAN_KEY in part:
                del part[PLAN_KEY]
                part.pop(_EXPERTS, None)
        return data

    def to_json_file(self, json_file_path: str | Path, use_diff: bool = True) -> None:
        """Write the config for readers of other generations, too."""
        super().to_json_file(json_file_path, use_diff=use_diff)  # type: ignore[misc]
        path, name = Path(json_file_path), text_path(self)
        with edited(path) as data:
            self._edit(data, data[name] if name else data, bool(_CHECKPOINT.fullmatch(path.absolute().parent.name)))

    def _edit(self, data: dict[str, Any], text: dict[str, Any], resumed: bool) -> None:
        """Edit the written config, and its text part."""
        older = entries_of_4(text)
        if not isinstance(older, str) and not (
            resumed and older.get("rope_scaling", {}).get("rope_type") in UNREADABLE
        ):
            text |= older
        elif PLAN_KEY in data:  # without it, the model computes what transformers makes of its config
            stop_4(data)


class StopsReaders(CarriesPlan):
    """Mixin for the config of a patched model whose positions no config can express."""

    def to_dict(self) -> dict[str, Any]:
        """Return the entries of the config, one of which stops a model that is built from them."""
        data = super().to_dict()
        return {**data, _EXPERTS: _unbuildable(data[PLAN_KEY])} if PLAN_KEY in data else data

    def _edit(self, data: dict[str, Any], text: dict[str, Any], resumed: bool) -> None:
        stop = stop_readers(data, text_path(self))
        rope = text.get("rope_parameters")
        if rope:
            data[REPLACED_KEY]["rope_parameters"] = copy.deepcopy(rope)
            for parameters in (rope, *rope.values()):
                if isinstance(parameters, dict) and "rope_type" in parameters:
                    parameters["rope_type"] = stop
            older = {key: float(rope[key]) for key in ("rope_theta",) if key in rope}
            if older or not resumed:  # without the base, version 5 would warn of a deprecated key
                text |= {**older, "rope_scaling": {"rope_type": stop, "factor": 1.0}}  # for converters


def stop_4(data: dict[str, Any]) -> None:
    """Make a config with a plan stop transformers 4 but not version 5."""
    data[_STOP_4] = {f"{_sentence(data[PLAN_KEY])}; open the directory by transformers 5": []}


def stop_readers(data: dict[str, Any], part: str) -> str:
    """Make a config with a plan stop both generations of transformers. Return the sentence that they quote."""
    stop = f"{_sentence(data[PLAN_KEY])}; open the directory by hf_posext.load_patched(path)"
    data |= dict.fromkeys(_IMPLEMENTATIONS, stop)  # which transformers itself never saves
    data |= {_STOP_4: {stop: []}, REPLACED_KEY: {"part": part}}
    return stop


def entries_of_4(text: Mapping[str, Any]) -> dict[str, Any] | str:
    """Return what the text part of a config needs beside `rope_parameters`, or the reason why nothing would do."""
    rope = text.get("rope_parameters")
    if not rope:
        return {}
    family, kind = text.get("model_type"), rope.get("rope_type", "default")
    if any(isinstance(entry, Mapping) for entry in rope.values()):
        return "its frequencies differ between layer types, which transformers 4 reads for no rope type"
    if family not in FAMILIES:
        return f"{family} is not among the families of transformers 4 that read rope_scaling in full"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        return "transformers 4 reads the share of rotated channels elsewhere"
    if kind not in TYPES or "mrope_section" in rope:
        return f"transformers 4 has no rope type {kind!r} like that of transformers 5"
    entries: dict[str, Any] = {"rope_theta": float(rope["rope_theta"])}
    if kind == "default":
        return entries
    elsewhere = ("rope_theta", "partial_rotary_factor")
    scaling = {key: _as_float(key, value) for key, value in rope.items() if key not in elsewhere}
    if kind == "linear":
        scaling["type"] = kind  # the key that ollama reads
    if kind == "longrope" and rope["short_factor"] != rope["long_factor"]:
        entries["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    return {**entries, "rope_scaling": scaling}


def _as_float(key: str, value: Any) -> Any:
    """Convert whole numbers other than lengths to floats, for which transformers 4 logs no error."""
    whole = isinstance(value, int) and not isinstance(value, bool) and key != "original_max_position_embeddings"
    return float(value) if whole else value


def saved_plan(config: PreTrainedConfig) -> ExtensionPlan | None:
    """Return the plan in a saved model's config; `None` without one."""
    data = getattr(config, PLAN_KEY, None)
    return None if data is None else ExtensionPlan.from_dict(data)


def open_patched_config(
    name: str | Path, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedConfig:
    """Open the config of a model, patched or not, as it was in memory when it was written."""
    data, _ = PreTrainedConfig.get_config_dict(name, revision=revision)
    if REPLACED_KEY not in data or data.get("model_type") not in CONFIG_MAPPING:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code
        )
        if PLAN_KEY in data:
            vars(config).pop(_STOP_4, None)
        return config
    cls = CONFIG_MAPPING[data["model_type"]]
    opened: PreTrainedConfig = cls.from_dict(restored(data), name_or_path=str(name))
    return opened


def without_stop(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a config from which a model can be built; the same object if nothing stops it."""
    if not hasattr(config, REPLACED_KEY):
        return config
    built: PreTrainedConfig = type(config).from_dict(restored(config.to_dict()))
    return built


def restored(data: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of a config, in memory or as it was written, without those that stop readers."""
    replaced = data.get(REPLACED_KEY, {"part": ""})
    data = {key: value for key, value in data.items() if key not in (REPLACED_KEY, _STOP_4, *_IMPLEMENTATIONS)}
    text = data[replaced["part"]] if replaced["part"] else data
    if "rope_parameters" in replaced:
        text.pop("rope_scaling", None)
        text["rope_parameters"] = replaced["rope_parameters"]
    return data


def text_path(config: PreTrainedConfig) -> str:
    """Return the key of the text config in `config.json`; `""` if the whole config is about text."""
    text = config.get_text_config(decoder=True)
    return next((name for name in config.sub_configs if getattr(config, name, None) is text), "")


def carry(model: PreTrainedModel, state: InForce) -> None:
    """Make the config of a patched model, and those of its adapters, contain the plan when written.

    If no config can express the positions, readers that do not know the plan are stopped.
    """
    config, log = model.config, state.log
    log.on_undo(model.register_load_state_dict_pre_hook(_before_load).remove)
    if state.plan.changes_nothing:
        return
    fields = [(limited, name) for limited, name, _ in length_fields(model)]
    for limited in text_configs(model):
        raised = [name for owner, name in fields if owner is limited and log.knows(owner, name)]
        log.set(limited, LIMITS_KEY, {name: log.before(limited, name) for name in raised})
    if not config.architectures:  # `model.save_pretrained` says it, `model.config.save_pretrained` does not
        log.set(config, "architectures", [type(model).__name__])
    modules = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    has_experts = any(module._can_set_experts_implementation() for module in modules)
    # A part with a config of its own, such as the language model of a multimodal one, may be saved alone.
    changed = [module.config for module in modules if any(log.changed(part) for part in module.modules())]
    for each in {id(each): each for each in (config, *changed)}.values():
        log.set(each, PLAN_KEY, state.plan.to_dict())
        log.set(each, "__class__", mix(StopsReaders if state.native_obstacle else CarriesPlan, type(each)))
        if state.native_obstacle and not has_experts:
            # Without experts, only the constructor of another model reads this entry, and stops `from_config`.
            log.set(each, "_experts_implementation_internal", _unbuildable(state.plan))
    carry_in_adapters(model, state, getattr(model, "peft_config", None))
    # An adapter that comes after the patch is met when it is saved: every writer asks the model for its state first.
    log.on_undo(model.register_state_dict_pre_hook(_before_state_dict).remove)


class CarriesPlanInAdapter(Carried):
    """Mixin for the config of an adapter on a patched model, which writes further entries."""

    _posext_entries: dict[str, Any]

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write `adapter_config.json` with the plan, a type that PEFT refuses, and a rank that servers cannot
        compute with: vLLM and SGLang do not look at the type."""
        super().save_pretrained(str(save_directory), **kwargs)  # type: ignore[misc]
        with edited(Path(save_directory) / "adapter_config.json") as data:
            stop = f"{data['peft_type']} under {_sentence(self._posext_entries[PLAN_KEY])}"
            replaced: dict[str, Any] = {name: data[name] for name in ("peft_type", "r") if name in data}
            stops = dict.fromkeys(replaced, f"{stop}; open the directory by hf_posext.load_adapter(path)")
            data |= {**self._posext_entries, REPLACED_KEY: replaced, **stops}


def carry_in_adapters(model: PreTrainedModel, state: InForce, configs: Mapping[str, Any] | None) -> None:
    """Make the configs of a patched model's adapters, by name, contain its plan when written."""
    if not configs:
        return
    entries = {PLAN_KEY: state.plan.to_dict(), BASE_KEY: BaseModel.of(model).to_dict()}
    for config in configs.values():
        if isinstance(config, CarriesPlanInAdapter):
            config._posext_entries = entries  # of the weights as they are now
        else:
            state.log.set(config, "_posext_entries", entries)
            state.log.set(config, "__class__", mix(CarriesPlanInAdapter, type(config)))


def tell_adapters(model: nn.Module) -> None:
    """Prepare the adapters of a patched model, prompt learning included, to be saved with its plan."""
    base = unwrap(model)
    state = mark_of(base)
    if state is not None and not state.plan.changes_nothing:
        carry_in_adapters(base, state, getattr(model, "peft_config", None))
        state.knows_prompts = True


def _before_state_dict(model: nn.Module, prefix: str, keep_vars: bool) -> None:
    """Prepare the adapters that a patched model received after the patch."""
    state: InForce | None = vars(model).get(MARK)
    if state is None or not isinstance(model, PreTrainedModel) or state.plan.changes_nothing:
        return
    configs = getattr(model, "peft_config", None)
    if prefix.endswith("base_model.") and configs is None and not state.knows_prompts:
        raise UnsupportedModelError(
            "PEFT keeps the config of prompt learning out of the patched model, so that what it saves would lack the "
            "plan. Save by save_adapter(model, path), or give the Trainer callbacks=[hf_posext.training.KeepsPlan()]."
        )
    carry_in_adapters(model, state, configs)


def _before_load(model: nn.Module, *arguments: Any) -> None:
    """Refuse weights of a checkpoint from which a `Trainer` resumes a run under another plan."""
    state: InForce | None = vars(model).get(MARK)
    # The weights come as tensors and names. Only the method of the Trainer further up the stack has the directory.
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_name != "_load_from_checkpoint":
        frame = frame.f_back
    directory = None if frame is None else frame.f_locals.get("resume_from_checkpoint")
    if state is not None and directory is not None:
        check_resumed(Path(directory), state.plan)


def check_resumed(directory: Path, plan: ExtensionPlan | None) -> None:
    """Refuse to resume a run from a checkpoint that was saved under another plan than that of the model."""
    saved = ExtensionPlan.load(directory) if has_plan(directory) else None
    if saved is None and not any((directory / name).is_file() for name in ("config.json", "adapter_config.json")):
        return  # weights alone, as FSDP saves its shards
    saved, plan = (None if entry is None or entry.changes_nothing else entry for entry in (saved, plan))
    if saved != plan:
        raise TrainingError(
            f"Expected {'a model without a patch' if saved is None else f'the plan ({saved.describe()})'}, from which "
            f"{directory} was saved, got {'a model without a patch' if plan is None else plan.describe()}. Patch the "
            "model as before, or open the checkpoint, patch it, and start another run."
        )


BASE_FILE = "posext_base.json"
BASE_KEY = "posext_base"
"""Entry of `adapter_config.json` that contains the same, where PEFT wrote the directory."""

TENSORS = 16
VALUES = 8
ROUNDING = 2**-8  # bfloat16 keeps 8 bits: half a unit in the last place, once when written and once when read
SMALLEST = 1e-6  # below this float16 has no full precision


@dataclass(frozen=True)
class Sample:
    """Numbers evenly spaced over one weight, with its path in the base model and its whole shape."""

    name: str
    shape: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class BaseModel:
    """Identity of the model that an adapter was trained on: its class, its commit on the Hub, and samples of its
    weights."""

    architecture: str
    revision: str | None
    samples: tuple[Sample, ...]

    @classmethod
    def of(cls, model: nn.Module) -> BaseModel:
        """Return the identity of a model in memory, with or without an adapter."""
        inner = unwrap(model)
        weights = {name: weight for name, weight in _weights(model).items() if weight.numel()}
        names = sorted(weights)
        chosen = [names[i * len(names) // TENSORS] for i in range(TENSORS)] if len(names) > TENSORS else names
        samples = tuple(Sample(name, tuple(weights[name].shape), _values(weights[name])) for name in chosen)
        return cls(type(inner).__name__, getattr(inner.config, "_commit_hash", None), samples)

    @classmethod
    def load(cls, directory: Path) -> BaseModel:
        """Read the identity from the directory of an adapter.

        Raises:
            CheckpointError: no such file or entry, or not what [`~BaseModel.save`] writes.
        """
        path = directory / BASE_FILE
        beside = None if path.is_file() else read_json(directory / "adapter_config.json").get(BASE_KEY)
        try:
            return decode(cls, read_json(path) if beside is None else beside, where=BASE_FILE)
        except PlanError as error:
            raise CheckpointError(
                f"{directory / BASE_FILE} is corrupt: {error}. Save the adapter again: save_adapter(model, path)"
            ) from error

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self), allow_nan=False))
        return plain

    def save(self, directory: Path) -> None:
        """Write the identity into the directory of an adapter."""
        (directory / BASE_FILE).write_text(json.dumps(self.to_dict(), indent=1) + "\n")

    def differs(self, model: nn.Module, trained: Container[str] = ()) -> str | None:
        """Return the difference between a model, with or without an adapter, and this one; `None` without one.

        Args:
            trained (`Container[str]`): names in the file of the adapter, whose weights need not be those of the base.
        """
        name = type(unwrap(model)).__name__
        if name != self.architecture:
            return f"it is a {name}, the adapter was trained on a {self.architecture}"
        weights = _weights(model)
        for sample in self.samples:
            weight = weights.get(sample.name)
            if weight is None or f"base_model.model.{sample.name}" in trained:  # quantised, or on another device
                continue
            if tuple(weight.shape) != sample.shape:
                return f"its {sample.name} has shape {tuple(weight.shape)}, not {sample.shape}"
            pairs = zip(_values(weight), sample.values, strict=True)
            if not all(math.isclose(a, b, rel_tol=ROUNDING, abs_tol=SMALLEST) for a, b in pairs):
                return f"its {sample.name} has other values"
        return None


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights of the base by the path that they have without an adapter.

    Those that an adapter layer contains, that a patch replaces, that are quantized, or of which this process has a
    share only, are left out.
    """
    inner = unwrap(model)
    adapted = tuple(
        f"{path}." for path, module in inner.named_modules() if type(module).__module__.startswith("peft.")
    )
    replaced = {f"{path_without_adapter(path)}.weight" for path in position_tables(inner)}
    return {
        path: weight
        for path, weight in inner.named_parameters()
        if not path.startswith(adapted)
        and path not in replaced
        and weight.is_floating_point()
        # shards and quantized weights may be tensors of their own class, with few operations
        and type(weight.data) is torch.Tensor
        and not weight.is_meta
    }


def _values(weight: torch.Tensor) -> tuple[float, ...]:
    flat = weight.detach().flatten()
    count = min(VALUES, flat.numel())
    index = torch.tensor([i * flat.numel() // count for i in range(count)], device=flat.device)
    return tuple(flat[index].float().cpu().tolist())
