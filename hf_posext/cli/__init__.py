"""The command line: `hf-posext`, or `python -m hf_posext`."""

from .app import app, main
from .explore import env, explain, inspect, methods, page, recommend, search
from .making import export, finetune, gguf, serve
from .measuring import card, compare, evaluate, report

__all__ = [
    "app",
    "card",
    "compare",
    "env",
    "evaluate",
    "explain",
    "export",
    "finetune",
    "gguf",
    "inspect",
    "main",
    "methods",
    "page",
    "recommend",
    "report",
    "search",
    "serve",
]
