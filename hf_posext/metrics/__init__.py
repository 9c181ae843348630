"""Modules for `evaluate`: `evaluate.load(path)` reads each from its folder, and each is a class to import."""

from ..packages import require

require("eval")

from .long_document_perplexity import LongDocumentPerplexity

__all__ = ["LongDocumentPerplexity"]
