"""Shipped models and novels. Results name them by their paths in the repository."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_posext

ROOT = Path(__file__).resolve().parent.parent


def load(name: str) -> tuple[Any, Any]:
    """Return a shipped model in float32 and its tokenizer, and set PyTorch to one thread."""
    torch.set_num_threads(1)
    path = f"examples/tiny/{name}"
    model = AutoModelForCausalLM.from_pretrained(ROOT / path, dtype=torch.float32)
    model.config.name_or_path = path
    return model, AutoTokenizer.from_pretrained(ROOT / path)


def novels(name: str, limit: int | None = None) -> Any:
    """Return the first novels of `train`, `validation` or `heldout`."""
    path = f"examples/data/{name}.jsonl"
    texts = hf_posext.load_documents(str(ROOT / path), limit=limit)
    texts.source["dataset"] = path
    return texts
