"""The command line: `hf-posext`, or `python -m hf_posext`. See what a model has, what can be done, and what it did."""

from .app import app, main
from .card import card
from .compare import compare
from .env import env
from .evaluate import evaluate
from .explain import explain
from .explore import inspect, methods
from .export import export, gguf
from .finetune import finetune
from .page import page
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
]
