"""What a server needs to run a plan, and what it does otherwise than transformers."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig

from ..errors import ExportError
from ..patching.saved_config import text_path
from ..plan import ExtensionPlan

DIRECTORY = "{directory}"
"""Stands in commands where the exported directory goes."""


@dataclass(frozen=True)
class Serving:
    """How a server runs a plan.

    Attributes:
        server (`str`): its name.
        read_from (`str`): the version of its source that this was read from.
        plan (`ExtensionPlan`): the positions.
        commands (`tuple[tuple[str, ...], ...]`): to run one after the other; `{directory}` stands for the export.
        text (`Mapping`): entries of the text part of `config.json` that are other than transformers would have them.
        override (`tuple[str, ...]`): flags that give the base model, not exported, the same positions; empty where
            there are none.
        differences (`tuple[str, ...]`): what the server ignores, or does in another way, as far as this plan goes.
    """

    server: str
    read_from: str
    plan: ExtensionPlan
    commands: tuple[tuple[str, ...], ...] = ()
    text: Mapping[str, Any] = field(default_factory=dict)
    override: tuple[str, ...] = ()
    differences: tuple[str, ...] = ()

    def command_lines(self, directory: str) -> list[str]:
        """The commands as a shell takes them.

        Args:
            directory (`str`): of the export.
        """
        return [shlex.join(word.replace(DIRECTORY, directory) for word in command) for command in self.commands]


def refuse(server: str, plan: ExtensionPlan, reason: str, instead: str = "") -> ExportError:
    """The error that a server cannot compute a plan's positions."""
    what = instead or "a plan that only changes frequencies (yarn, ntk, theta, ...) can be exported"
    if any(entry.growth for entry in plan.rotaries):
        what += "; the rope type 'dynamic' of servers is another thing, a base that is fixed when they start"
    return ExportError(f"{server} cannot run ({plan.describe()}): {reason}; {what}")


def override_flag(config: PreTrainedConfig, plan: ExtensionPlan, entries: Mapping[str, Any]) -> str:
    """What a flag that overrides `config.json` is to say, as JSON: at the top, or in its text part.

    Args:
        config (`PreTrainedConfig`): of the whole model.
        plan (`ExtensionPlan`): for the length.
        entries (`Mapping`): of the text config, other than for transformers.
    """
    changed = {"max_position_embeddings": plan.target_length, **entries}
    path = text_path(config)
    return json.dumps({path: changed} if path else changed, separators=(",", ":"))
