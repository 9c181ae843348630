"""Metrics for `evaluate`. `evaluate.load(path)` loads each from its folder, and each is also a class to import."""

from ..packages import require

require("eval")

from .long_document_perplexity.long_document_perplexity import LongDocumentPerplexity

__all__ = ["LongDocumentPerplexity"]
