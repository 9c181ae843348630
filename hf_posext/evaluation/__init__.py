"""Perplexity that is right: protocols, the truncation control, pass keys, intervals, and results with provenance."""

from ..packages import require

require("eval")

from .compare import compare
from .contrast.key_tokens import find_key_tokens
from .contrast.longppl import longce_weights, longppl
from .perplexity import evaluate_perplexity
from .questions.passkey import passkey_accuracy
from .questions.retrieval import retrieval
from .results.results import Results
from .results.tracking import log_results
from .texts.documents import Document, Documents, load_documents
from .texts.recipes import RECIPES

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
