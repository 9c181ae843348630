"""What is in the directory of an adapter, read without opening a weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..decode import short
from ..errors import CheckpointError, PlanMismatchError
from ..patching.fingerprint import BASE_FILE, BASE_KEY, BaseModel
from ..patching.saved_config import REPLACED_KEY
from ..patching.untrusted import check_directory, read_json
from ..plan import PLAN_FILE, PLAN_KEY, ExtensionPlan

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
CARD_FILE = "README.md"
FILES = (CONFIG_FILE, WEIGHTS_FILE, PLAN_FILE, BASE_FILE, CARD_FILE, "config.json", "*.png", "tokenizer*", "*.jinja")
"""What goes to the Hub, and what is taken from there."""

OUR_KEYS = (PLAN_KEY, BASE_KEY, REPLACED_KEY, "needs_the_positions_of_posext_plan_see_README")
"""Entries of `adapter_config.json` that PEFT does not know; the last one is of directories from before 0.2."""


@dataclass(frozen=True)
class AdapterDirectory:
    """The files of an adapter.

    Attributes:
        path (`Path`): where they are.
        config (`Mapping`): `adapter_config.json` as PEFT wrote it.
        plan (`ExtensionPlan`): the positions that it was trained with.
        base (`BaseModel`): the model that it was trained on.
        shapes (`Mapping[str, tuple[int, ...]]`): of its weights, by name.
    """

    path: Path
    config: Mapping[str, Any]
    plan: ExtensionPlan
    base: BaseModel
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def read(cls, directory: str | Path) -> AdapterDirectory:
        """
        Raises:
            CheckpointError: a directory that is incomplete, corrupt or hostile.
            PlanError: no plan there, a corrupt one, or one of a newer schema.
            PlanMismatchError: two plans there.
        """
        path = Path(directory)
        check_directory(path, WEIGHTS_FILE)
        entries = read_json(path / CONFIG_FILE)
        replaced = entries.get(REPLACED_KEY) or {}
        config = {key: value for key, value in entries.items() if key not in OUR_KEYS} | dict(replaced)
        plan = ExtensionPlan.load(path)
        if PLAN_KEY in entries and ExtensionPlan.from_dict(entries[PLAN_KEY]) != plan:
            raise PlanMismatchError(f"{path} contains two plans, in {PLAN_FILE} and in {CONFIG_FILE}; save it again")
        found = cls(path, config, plan, BaseModel.load(path), _shapes(path / WEIGHTS_FILE))
        found._check_config()
        return found

    @property
    def base_name(self) -> str | None:
        """Folder or Hub id of the base model, as PEFT wrote it."""
        name = self.config.get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None

    @property
    def modules_to_save(self) -> tuple[str, ...]:
        """Modules of the base that were trained whole."""
        return tuple(self.config.get("modules_to_save") or ())

    def _check_config(self) -> None:
        """Refuse what PEFT would act on before any weight is compared."""
        where = self.path / CONFIG_FILE
        if self.config.get("megatron_config") is not None:
            raise CheckpointError(f"{where} has a megatron_config, for which PEFT imports a module that it names")
        named, patterns = self.config.get("modules_to_save") or [], self.config.get("rank_pattern") or {}
        if not (isinstance(named, list) and all(isinstance(name, str) for name in named)):
            raise CheckpointError(f"{where} has modules_to_save {short(named)}; a list of names belongs there")
        if not isinstance(patterns, Mapping):
            raise CheckpointError(f"{where} has rank_pattern {short(patterns)}; a rank for each module belongs there")
        held = max((shape[0] for name, shape in self.shapes.items() if ".lora_A." in name), default=None)
        ranks = patterns.values() or [self.config.get("r")]  # the general rank may be of no module beside patterns
        if held is not None and not all(isinstance(rank, int) and 0 < rank <= held for rank in ranks):
            raise CheckpointError(f"{where} has rank {short(max(ranks, key=str))}, its weights {held}; one is wrong")
        for name in self.modules_to_save:
            if not any(f".{name}." in key for key in self.shapes):
                raise CheckpointError(
                    f"{self.path / WEIGHTS_FILE} lacks {name!r}, which {CONFIG_FILE} lists in modules_to_save; save "
                    "the adapter again by save_adapter(model, path), which keeps all that was trained"
                )


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(path, framework="pt") as weights:
            return {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from error
