"""Protocols of perplexity: the windows that are read of a document, and the tokens that count."""
