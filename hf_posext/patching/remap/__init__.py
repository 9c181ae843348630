"""Rotation inside attention: positions remapped for each query-key pair, per-row frequencies and query scales."""
