"""Makes every writer of a patched model write its plan.

`Trainer.save_model`, `save_pretrained` of transformers and of PEFT, `push_to_hub` and TRL know nothing of plans. All
of them write the config of the model, and PEFT writes that of the adapter. A patch therefore puts its plan into both.
PEFT refuses an unknown `peft_type`, so that an adapter stops readers that do not know its plan.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from ..errors import UnsupportedModelError
from ..plan import PLAN_KEY
from .fingerprint import BASE_KEY, BaseModel
from .mixin import Carried, mix
from .ownership import MARK, InForce
from .saved_config import REPLACED_KEY, CarriesPlan, StopsReaders, named

if TYPE_CHECKING:
    from torch import nn


def carry(model: PreTrainedModel, state: InForce) -> None:
    """Let a patched model's config, and those of its adapters, be written with the plan.

    Args:
        model (`PreTrainedModel`): patched; its config is its own.
        state (`InForce`): of the patch. Where no config can say the positions, readers that do not know the plan are
            stopped.
    """
    config, log = model.config, state.log
    log.set(config, PLAN_KEY, state.plan.to_dict())
    if not config.architectures:  # `model.save_pretrained` says it, `model.config.save_pretrained` does not
        log.set(config, "architectures", [type(model).__name__])
    log.set(config, "__class__", mix(StopsReaders if state.native_obstacle else CarriesPlan, type(config)))
    carry_in_adapters(model, state, getattr(model, "peft_config", None))
    # An adapter that comes after the patch is met when it is saved: every writer asks the model for its state first.
    log.on_undo(model.register_state_dict_pre_hook(_before_state_dict).remove)


class CarriesPlanInAdapter(Carried):
    """Mixed into the class of the config of an adapter on a patched model.

    Attributes:
        _posext_entries (`dict`): what is written beside its own entries.
    """

    _posext_entries: dict[str, Any]

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write `adapter_config.json` with the plan, a type that PEFT refuses, and a rank that servers cannot
        compute with: vLLM and SGLang do not look at the type."""
        super().save_pretrained(str(save_directory), **kwargs)  # type: ignore[misc]
        path = Path(save_directory) / "adapter_config.json"
        data = json.loads(path.read_text(encoding="utf-8"))
        stop = f"{data['peft_type']} under {named(self._posext_entries[PLAN_KEY])}"
        replaced = {name: data[name] for name in ("peft_type", "r") if name in data}
        stops = dict.fromkeys(replaced, f"{stop}; open the directory by hf_posext.load_adapter(path)")
        data |= {**self._posext_entries, REPLACED_KEY: replaced, **stops}
        path.write_text(json.dumps(data, indent=2, sort_keys=True), encoding="utf-8")


def carry_in_adapters(model: PreTrainedModel, state: InForce, configs: Mapping[str, Any] | None) -> None:
    """Let adapters of a patched model be written with its plan.

    Args:
        model (`PreTrainedModel`): patched.
        state (`InForce`): of the patch.
        configs (`Mapping[str, PeftConfig]`, *optional*): of its adapters, by name.
    """
    if not configs:
        return
    entries = {PLAN_KEY: state.plan.to_dict(), BASE_KEY: BaseModel.of(model).to_dict()}
    for config in configs.values():
        if isinstance(config, CarriesPlanInAdapter):
            config._posext_entries = entries  # of the weights as they are now
        else:
            state.log.set(config, "_posext_entries", entries)
            state.log.set(config, "__class__", mix(CarriesPlanInAdapter, type(config)))


def _before_state_dict(model: nn.Module, prefix: str, keep_vars: bool) -> None:
    """Meet the adapters that a patched model got after the patch."""
    state: InForce | None = vars(model).get(MARK)
    if state is None or not isinstance(model, PreTrainedModel) or state.plan.changes_nothing:
        return
    configs = getattr(model, "peft_config", None)
    if prefix.endswith("base_model.") and configs is None and not state.knows_prompts:
        raise UnsupportedModelError(
            "PEFT keeps the config of prompt learning out of the patched model, so that what it saves would lack the "
            "plan; save by save_adapter(model, path), or give the Trainer callbacks=[hf_posext.training.KeepsPlan()]"
        )
    carry_in_adapters(model, state, configs)
