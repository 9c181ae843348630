"""Longer context for any transformers model: patch its positions, undo to the bit, measure what it did.

Importing this package patches nothing and loads neither torch nor transformers until a name is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .adapters import load_adapter, save_adapter, verify_adapter
    from .diagnosis import Diagnosis, diagnose
    from .errors import PosExtError as PosExtError
    from .evaluation import EvaluationConfig, Results, compare, evaluate_perplexity, load_documents, longppl, retrieval
    from .export import export_checkpoint
    from .frequency_search import search
    from .methods import (
        DPE,
        EABF,
        NTK,
        ALiBiLinear,
        ALiBiNTK,
        BucketLinear,
        BucketMaxDistance,
        CoPE,
        Decay,
        DualChunk,
        DynamicNTK,
        DynamicYaRN,
        Fade,
        JetLong,
        LaMPE,
        LeakyReRoPE,
        Linear,
        Llama3,
        Llama4Temperature,
        LogN,
        LongRoPE,
        Method,
        NoExtension,
        NoPE,
        Partial,
        ReRoPE,
        Resonance,
        SelfExtend,
        SelfLogistic,
        Sinks,
        SinusoidLinear,
        StringShift,
        TableCubic,
        TableGroup,
        TableHierarchical,
        TableLinear,
        TableRepeat,
        Theta,
        YaRN,
        list_methods,
        register,
    )
    from .patching import Patch, detect_scheme, find_patch, load_patched, patch_model, unpatch_model
    from .plan import ExtensionPlan
    from .recommendation import Recommendation, recommend
    from .scheme import PositionalScheme
    from .training.finetune import finetune

_HOMES = {
    "adapters": "load_adapter save_adapter verify_adapter",
    "diagnosis": "Diagnosis diagnose",
    "errors": "PosExtError",
    "evaluation": "EvaluationConfig Results compare evaluate_perplexity load_documents longppl retrieval",
    "export": "export_checkpoint",
    "frequency_search": "search",
    "methods": "ALiBiLinear ALiBiNTK BucketLinear BucketMaxDistance CoPE DPE Decay DualChunk DynamicNTK DynamicYaRN "
    "EABF Fade JetLong LaMPE LeakyReRoPE Linear Llama3 Llama4Temperature LogN LongRoPE Method NTK NoExtension NoPE "
    "Partial ReRoPE Resonance SelfExtend SelfLogistic Sinks SinusoidLinear StringShift TableCubic TableGroup "
    "TableHierarchical TableLinear TableRepeat Theta YaRN list_methods register",
    "patching": "Patch detect_scheme find_patch load_patched patch_model unpatch_model",
    "plan": "ExtensionPlan",
    "recommendation": "Recommendation recommend",
    "scheme": "PositionalScheme",
    "training": "finetune",
}
"""Public names by the room that they are imported from when they are first used."""

_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'hf_posext' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
