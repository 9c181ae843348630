"""Settings of a run: its numbers, and the preset of trained weights."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig, PeftModel
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from transformers import PreTrainedModel

from ..errors import InvalidParameterError
from ..export.servers import MUTATING
from ..patching.sites import attention_projections, embeddings, norms, shortest_names, tied_head
from ..plan import ExtensionPlan


@dataclass(frozen=True)
class Settings:
    """Numbers of a run, described in [`finetune`]."""

    length: int
    steps: int
    batch_size: int
    accumulation: int
    warmup: int
    pack: bool
    pose: int | None
    shifted: int | None
    longce: int | None
    bf16: bool
    gradient_checkpointing: bool
    patience: int | None
    save_every: int
    seed: int

    def check(self, plan: ExtensionPlan) -> None:
        """Refuse numbers that are out of bounds for a plan, and settings that exclude each other."""
        length, target, pose, groups, short = self.length, plan.target_length, self.pose, self.shifted, self.longce
        positive = ("steps", "batch_size", "accumulation", "length")
        problems = [
            *(
                (getattr(self, name) < 1, f"Expected {name} to be 1 or more, got {getattr(self, name)}.")
                for name in positive
            ),
            (
                not 0 <= self.warmup < self.steps,
                f"Expected warmup to be less than the {self.steps} steps, got {self.warmup}. Pass 0 to start at the "
                "full learning rate.",
            ),
            (
                not 2 <= length <= target,
                f"Expected length to be 2 to {target} tokens, the target of {plan.method}, got {length}. Pass a "
                "smaller length, or a larger factor.",
            ),
            (
                pose is not None and not 2 <= pose <= length,
                f"Expected pose to be 2 chunks in a row or more, at most its {length} tokens, got {pose}. The paper "
                "has 2.",
            ),
            (
                pose is not None and length >= target,
                f"Expected length to be below the target of {target} tokens for pose, got {length}. Pass "
                f"{plan.trained_length}, for example, or a larger factor.",
            ),
            (
                pose is not None and (self.pack or short),
                f"pose and {'pack' if self.pack else 'longce'} both decide what the positions mean. Leave one out.",
            ),
            (
                groups is not None and (groups < 2 or length % (2 * groups)),
                f"Expected shifted to be 2 or more groups, twice whose number divides the length of {length}, got "
                f"{groups}. The paper has 4.",
            ),
            (
                groups is not None and self.pack,
                "shifted attention takes rows of one document. Leave out pack or shifted.",
            ),
            (
                short is not None and not 1 <= short < length / 2,
                f"Expected longce to be less than half of the length of {length} tokens, got {short}. Pass "
                f"{length // 8}, for example.",
            ),
            (
                short is not None and self.pack,
                "longce weighs by contexts of one document. Leave out pack or longce.",
            ),
            (
                self.patience is not None and self.patience < 1,
                f"Expected patience to be 1 or more evaluations, got {self.patience}. Leave it out for none.",
            ),
        ]
        for wrong, message in problems:
            if wrong:
                raise InvalidParameterError(message)


@dataclass(frozen=True)
class Preset:
    """Trained weights and their learning rates.

    Args:
        learning_rate (`float`): peak learning rate.
        rank (`int`, *optional*): rank of the LoRA matrices. `None` trains the weights themselves.
        alpha (`float`, *optional*, defaults to 16): the product of the LoRA matrices is scaled by `alpha / rank`.
        targets (`str` or `Sequence[str]`, *optional*, defaults to `"attention"`): linear layers that get LoRA: those
            in the attention of every layer, `"all-linear"`, or names in the form of PEFT's `target_modules`.
        embeddings (`bool`, *optional*, defaults to `False`): also train the token embeddings and position embedding
            tables. Output weights that are tied to them stay tied.
        norms (`bool`, *optional*, defaults to `False`): also train the normalization layers.
        ratio (`float`, *optional*, defaults to 1): learning rate of the second LoRA matrix relative to the first
            (LoRA+, https://arxiv.org/abs/2402.12354).
        options (`Mapping`, *optional*): further arguments of `peft.LoraConfig`, such as `{"use_dora": True}`.
        method (`str`, *optional*): the only method that the preset applies to.
    """

    learning_rate: float
    rank: int | None = None
    alpha: float = 16
    targets: str | Sequence[str] = "attention"
    embeddings: bool = False
    norms: bool = False
    ratio: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)
    method: str | None = None

    def __post_init__(self) -> None:
        for name, value in (("learning_rate", self.learning_rate), ("alpha", self.alpha), ("ratio", self.ratio)):
            if not (math.isfinite(value) and value > 0):
                raise InvalidParameterError(f"Expected {name} to be a number above 0, got {value}.")
        if self.rank is not None and self.rank < 1:
            raise InvalidParameterError(f"Expected rank to be 1 or more, got {self.rank}. Pass 8, for example.")
        if self.rank is None and (self.options or self.embeddings or self.norms or self.ratio != 1):
            raise InvalidParameterError(
                "Expected a rank beside settings of an adapter, got None, which trains all weights. Pass a rank."
            )
        start = str(self.options.get("init_lora_weights", "")).lower()
        if start.startswith(MUTATING):
            raise InvalidParameterError(
                f"init_lora_weights={start!r} changes the base weights, so that the adapter would be wrong on the "
                "base as it was. Choose another, such as 'orthogonal'."
            )


PRESETS = {
    "lora": Preset(learning_rate=2e-4, rank=8),
    "lora-plus": Preset(learning_rate=2e-4, rank=8, embeddings=True, norms=True),
    "dora": Preset(learning_rate=2e-4, rank=8, options={"use_dora": True}),
    "full": Preset(learning_rate=2e-5),
    "nope": Preset(learning_rate=1e-4, method="nope"),
}
"""Presets by name.

`lora` trains LoRA of rank 8 on the query, key, value, and output projections of every layer, as in LongLoRA and most
reports. `lora-plus` also trains embeddings and norms, which LongLoRA found to close the gap to `full` at 7 billion
parameters (https://arxiv.org/abs/2309.12307). `dora` trains magnitudes separately from directions
(https://arxiv.org/abs/2402.09353). `full` trains all weights. `nope` trains all weights at the trained length, after
the positions are dropped (DroPE).

The learning rates are the usual ones for models with billions of parameters: 2e-5 for all weights (position
interpolation, YaRN, LongLoRA, PoSE), 1e-4 after dropping positions (DroPE), and ten times that of `full` for adapters.
Small models need higher ones. The shipped models need 3e-3 for adapters, and for all weights 6e-4 with 64 rows per
step or 1e-4 with one.
"""


def as_preset(preset: str | Preset) -> Preset:
    """Return the preset of a name, or a given [`Preset`] unchanged."""
    if isinstance(preset, Preset):
        return preset
    if preset not in PRESETS:
        near = difflib.get_close_matches(str(preset), PRESETS, n=1)
        guess = f" Did you mean {near[0]!r}?" if near else ""
        raise InvalidParameterError(f"Expected preset to be one of {', '.join(PRESETS)}, got {preset!r}.{guess}")
    return PRESETS[preset]


def adapter_config(preset: Preset, model: PreTrainedModel) -> LoraConfig:
    """Return the adapter configuration of a preset, for a model that is already patched."""
    targets: Any = preset.targets
    if targets == "attention":
        targets = shortest_names(attention_projections(model), model)
    saved = (embeddings(model) if preset.embeddings else []) + (norms(model) if preset.norms else [])
    head = tied_head(model) if preset.embeddings else None
    peft_ties = head is not None and saved[0].rpartition(".")[2] in EMBEDDING_LAYER_NAMES
    if head is not None and not peft_ties:
        saved.append(head)  # `tie_again` ties the trained copies, because PEFT knows embeddings by a few names only
    arguments = {
        "task_type": "CAUSAL_LM",
        "r": preset.rank,
        "lora_alpha": preset.alpha,
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "modules_to_save": shortest_names(saved, model) or None,
        "ensure_weight_tying": peft_ties,
    }
    try:
        return LoraConfig(**{**arguments, **preset.options})
    except (TypeError, ValueError, ImportError) as error:
        raise InvalidParameterError(f"peft does not take the options of the adapter: {error}") from error


def tie_again(network: PeftModel) -> None:
    """Tie the trained copies of the embeddings and the output weights. PEFT does so for a few names only."""
    layers = (network.get_base_model().get_input_embeddings(), network.get_base_model().get_output_embeddings())
    inputs, outputs = (getattr(layer, "modules_to_save", None) for layer in layers)
    if inputs is None or outputs is None:
        return
    frozen, head = (layer.original_module.weight for layer in layers)  # below PEFT's wrappers
    if frozen is head or frozen.data_ptr() == head.data_ptr() != 0:
        outputs["default"].weight = inputs["default"].weight
