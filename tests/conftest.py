"""Models small enough to build in every test, and the shipped ones."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedModel

from hf_posext.testing import MODELS as BUILDERS
from hf_posext.testing import (
    TRAINED,
    arguments,
    logits,
    longer_gpt2,
    sharpen,
    tiny_bloom,
    tiny_gpt2,
    tiny_llama,
    tiny_t5,
    tiny_xglm,
    tokens,
)

__all__ = [
    "BUILDERS",
    "EXAMPLES",
    "TRAINED",
    "arguments",
    "default_dtype",
    "llama",
    "logits",
    "longer_gpt2",
    "realigned",
    "sharpen",
    "tiny_bloom",
    "tiny_gpt2",
    "tiny_llama",
    "tiny_t5",
    "tiny_xglm",
    "tokens",
]

torch.set_num_threads(1)

CACHE = tempfile.TemporaryDirectory(prefix="hf_posext-tests-")
"""Instead of the user's; goes when the tests end."""

os.environ["HF_DATASETS_CACHE"] = CACHE.name  # nothing above imports datasets

EXAMPLES = Path(__file__).parent.parent / "examples"


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Set the default dtype of the process, as scripts do that build large models in bfloat16."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class ErrorOnDeprecation(logging.Handler):
    """A deprecation that transformers reports about our calls fails the test (peft's idea)."""

    def emit(self, record: logging.LogRecord) -> None:
        if "deprecat" in record.getMessage().lower():
            raise AssertionError(f"transformers deprecation: {record.getMessage()}")


@pytest.fixture(autouse=True)
def deprecations_fail() -> Iterator[None]:
    handler = ErrorOnDeprecation()
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)


@pytest.fixture(autouse=True)
def compiled_code_is_forgotten() -> Iterator[None]:
    """Dynamo marks frames by their code, which all models share: one that a test left uncompiled would stay so."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture
def llama() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A saved tiny Llama."""
    tiny_llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def realigned(model: PreTrainedModel) -> PreTrainedModel:
    """
    The weights at addresses of torch's own choice, a multiple of 64 bytes, as those of a model built in memory are.

    Weights that were read are mapped from the file, at any multiple of 8; on some processors a product of matrices
    rounds differently there, and two models that are equal to the bit would give other last digits.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model
