"""Perplexity evaluation: protocols, the truncation control, passkeys, intervals, and results with provenance."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ..packages import require

if TYPE_CHECKING:
    from .comparison import compare, evaluate_perplexity
    from .config import EvaluationConfig
    from .documents import RECIPES, Document, Documents, load_documents
    from .key_tokens import find_key_tokens, longce_weights, longppl
    from .questions import passkey_accuracy, retrieval
    from .results import Results, log_results

_HOMES = {
    "comparison": ("compare", "evaluate_perplexity"),
    "config": ("EvaluationConfig",),
    "documents": ("RECIPES", "Document", "Documents", "load_documents"),
    "key_tokens": ("find_key_tokens", "longce_weights", "longppl"),
    "questions": ("passkey_accuracy", "retrieval"),
    "results": ("Results", "log_results"),
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
