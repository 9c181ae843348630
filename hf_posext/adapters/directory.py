"""What is in the directory of an adapter, read without opening a weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from ..decode import short
from ..errors import CheckpointError
from ..patching.untrusted import check_directory, read_json
from ..plan import PLAN_FILE, ExtensionPlan
from .fingerprint import BASE_FILE, BaseModel

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
CARD_FILE = "README.md"
FILES = (CONFIG_FILE, WEIGHTS_FILE, PLAN_FILE, BASE_FILE, CARD_FILE, "config.json", "*.png", "tokenizer*", "*.jinja")
"""What goes to the Hub, and what is taken from there."""

NOTICE = "needs_the_positions_of_posext_plan_see_README"
"""Key of `adapter_config.json` that PEFT does not know. It says so when an adapter is opened without this package, and
that is the one thing in the way of an adapter that answers wrongly on a base without the patch."""

_PREFIX = "base_model.model."
_LAYERS = ("lora_", "token_adapter")


@dataclass(frozen=True)
class AdapterDirectory:
    """The files of an adapter.

    Attributes:
        path (`Path`): where they are.
        config (`Mapping`): `adapter_config.json` without [`NOTICE`].
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
        """
        path = Path(directory)
        check_directory(path, WEIGHTS_FILE)
        config = {key: value for key, value in read_json(path / CONFIG_FILE).items() if key != NOTICE}
        plan = ExtensionPlan.load(path)
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

    def misfit(self, model: nn.Module) -> str | None:
        """A weight that the model has no place for; `None` where all have one.

        Args:
            model (`PreTrainedModel`): the base, patched, without an adapter.
        """
        modules, parameters = dict(model.named_modules()), dict(model.named_parameters(remove_duplicate=False))
        for key, shape in self.shapes.items():
            path = key.removeprefix(_PREFIX).split(".")
            layer = next((i for i, word in enumerate(path) if word.startswith(_LAYERS)), None)
            if layer is not None:
                module = modules.get(".".join(path[:layer]))
                if module is None:
                    return f"it has no module {'.'.join(path[:layer])}"
                weight: Any = getattr(module, "weight", None)
                side = {"lora_A": 1, "lora_B": 0}.get(path[layer])
                if side is None or weight is None or not weight.is_floating_point():  # quantised: of other shapes
                    continue
                if shape[side] not in weight.shape:
                    return f"its {'.'.join(path[:layer])} has shape {tuple(weight.shape)}, the adapter's {shape}"
                continue
            own = parameters.get(".".join(path))
            if own is None:
                return f"it has no weight {'.'.join(path)}"
            if tuple(own.shape) != shape:
                return f"its {'.'.join(path)} has shape {tuple(own.shape)}, the adapter's {shape}"
        return None


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(path, framework="pt") as weights:
            return {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from error
