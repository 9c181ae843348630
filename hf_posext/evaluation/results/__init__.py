"""From sums per document to rows with intervals, and rows to and from files."""
