"""A tiny random model of every causal-LM type of the installed transformers, and of the common encoders."""

import functools

from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .builder import TRAINED_LENGTH, VOCABULARY, build, tiny_config, token_ids
from .schemes import ENCODERS, NOT_BUILT, OTHER_SCHEMES, SEQ2SEQ

__all__ = [
    "ENCODERS",
    "NOT_BUILT",
    "SEQ2SEQ",
    "TRAINED_LENGTH",
    "VOCABULARY",
    "build",
    "candidate_types",
    "has_frequencies",
    "other_types",
    "rotary_types",
    "tiny_config",
    "token_ids",
]


def other_types() -> dict[str, str]:
    """Causal-LM types of the installed transformers without rotary frequencies, with their scheme."""
    return {name: scheme for name, scheme in OTHER_SCHEMES.items() if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}


def candidate_types() -> list[str]:
    """Every other causal-LM type that the zoo builds. A type that is new in transformers is among them.

    Costs nothing, where `rotary_types` builds them all: this is what tests are parametrised by.
    """
    return sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(OTHER_SCHEMES) - set(NOT_BUILT))


def has_frequencies(model: PreTrainedModel) -> bool:
    """Return whether a module of the model holds rotary frequencies."""
    return any(name.endswith("inv_freq") for module in model.modules() for name in {*module._buffers, *vars(module)})


@functools.cache
def rotary_types() -> list[str]:
    """The causal-LM types whose tiny model carries rotary frequencies, found by building all (some 20 s)."""
    return [model_type for model_type in candidate_types() if has_frequencies(build(model_type))]
