"""How perplexity is measured: which windows are read of a document, and which of their tokens count."""
