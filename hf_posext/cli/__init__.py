"""The command line: `hf-posext`, or `python -m hf_posext`."""

from .app import app, main
from .explore import env, explain, inspect, methods, page
from .export import export, gguf, serve
from .finetune import finetune
from .measuring import card, compare, evaluate, report
from .recommend import recommend, search

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
