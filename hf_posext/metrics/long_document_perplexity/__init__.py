"""Perplexity of documents from NLL sums and token counts, as a metric for `evaluate`."""

from .long_document_perplexity import LongDocumentPerplexity

__all__ = ["LongDocumentPerplexity"]
