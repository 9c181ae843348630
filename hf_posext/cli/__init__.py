"""The command line: `hf-posext`, or `python -m hf_posext`. See what a model has, what can be done, and what it did."""

from .app import app, main
from .compare import compare
from .explore import inspect, methods
from .report import report

__all__ = ["app", "compare", "inspect", "main", "methods", "report"]
