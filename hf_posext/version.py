"""Version of this package, in a bare checkout as well as installed."""

__version__ = "0.1.0"
