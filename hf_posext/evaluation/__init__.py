"""Perplexity that is right: protocols, the truncation control, pass keys, intervals, and results with provenance."""

from .compare import compare
from .documents import Document, Documents, load_documents
from .passkey import passkey_accuracy
from .perplexity import evaluate_perplexity
from .results import Results

__all__ = [
    "Document",
    "Documents",
    "Results",
    "compare",
    "evaluate_perplexity",
    "load_documents",
    "passkey_accuracy",
]
