"""Perplexity that is right: protocols, the truncation control, passkeys, intervals, and results with provenance."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ..packages import require

if TYPE_CHECKING:
    from .comparison import compare
    from .config import EvaluationConfig
    from .contrast.key_tokens import find_key_tokens
    from .contrast.longppl import longce_weights, longppl
    from .perplexity import evaluate_perplexity
    from .questions import passkey_accuracy, retrieval
    from .results.results import Results
    from .results.tracking import log_results
    from .texts.documents import Document, Documents, load_documents
    from .texts.recipes import RECIPES

_HOMES = {
    "comparison": ("compare",),
    "config": ("EvaluationConfig",),
    "contrast.key_tokens": ("find_key_tokens",),
    "contrast.longppl": ("longce_weights", "longppl"),
    "perplexity": ("evaluate_perplexity",),
    "questions": ("passkey_accuracy", "retrieval"),
    "results.results": ("Results",),
    "results.tracking": ("log_results",),
    "texts.documents": ("Document", "Documents", "load_documents"),
    "texts.recipes": ("RECIPES",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "RECIPES",
    "Document",
    "Documents",
    "EvaluationConfig",
    "Results",
    "compare",
    "evaluate_perplexity",
    "find_key_tokens",
    "load_documents",
    "log_results",
    "longce_weights",
    "longppl",
    "passkey_accuracy",
    "retrieval",
]


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used, so that settings can be read without torch."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name != "EvaluationConfig":  # settings need no package
        require("eval")
    value = getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
