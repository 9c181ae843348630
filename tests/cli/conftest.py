"""The commands silence transformers and datasets for the rest of the process; other tests listen to them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_posext import patch_model, save_adapter
from hf_posext.plan import PLAN_FILE

from ..adapters.helpers import with_adapter
from .helpers import MODEL


@pytest.fixture(autouse=True)
def loud_again() -> Iterator[None]:
    levels = transformers.logging.get_verbosity(), datasets.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(levels[0])
    datasets.logging.set_verbosity(levels[1])


@pytest.fixture(scope="session")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that plain transformers opens without its patch: its positions are remapped inside attention."""
    path = tmp_path_factory.mktemp("patched") / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(MODEL), AutoTokenizer.from_pretrained(MODEL)
    with patch_model(model, "rerope(window=32)", factor=2, trained_length=64, tokenizer=tokenizer) as patch:
        patch.save_pretrained(path)
    assert (path / PLAN_FILE).exists()
    return path


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the shipped model under a patch."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(MODEL), AutoTokenizer.from_pretrained(MODEL)
    patch_model(model, "yarn", factor=2, trained_length=64, tokenizer=tokenizer)
    return save_adapter(with_adapter(model), tmp_path_factory.mktemp("adapter") / "adapter")
