"""The command line: `hf-posext`, or `python -m hf_posext`."""

from .app import app, main
from .card import card
from .explore import env, explain, inspect, methods, page
from .export import export, gguf, serve
from .finetune import finetune
from .measuring import compare, evaluate
from .recommend import recommend, search
from .report import report

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
