"""Perplexity that is right: protocols, the truncation control, pass keys, intervals, and results with provenance."""

from .compare import compare
from .documents import Document, Documents, load_documents
from .key_tokens import find_key_tokens
from .longppl import longce_weights, longppl
from .passkey import passkey_accuracy
from .perplexity import evaluate_perplexity
from .recipes import RECIPES
from .results import Results
from .retrieval import retrieval
from .tracking import log_results

__all__ = [
    "RECIPES",
    "Document",
    "Documents",
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
