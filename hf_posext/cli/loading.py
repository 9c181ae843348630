"""Models from a folder or the Hub; whatever goes wrong on the way is one line."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InvalidParameterError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def quiet_libraries() -> None:
    """Keeps transformers and datasets from writing between the lines of a table.

    What datasets logs as an error it also raises, and is told then; transformers' errors still show.
    """
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    datasets.logging.set_verbosity(logging.CRITICAL)


def load_config(name: str) -> PreTrainedConfig:
    """The config of a model, without its weights.

    Args:
        name (`str`): a folder or Hub id.

    Raises:
        InvalidParameterError: no such model, or a config that transformers cannot read.
    """
    from transformers import AutoConfig

    quiet_libraries()
    with _one_line_errors(name):
        return AutoConfig.from_pretrained(name)


def load_model(name: str, dtype: str, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A language model (causal, masked or encoder-decoder, as its config says) and its tokenizer.

    Args:
        name (`str`): a folder or Hub id.
        dtype (`str`): `float32`, `bfloat16` or `float16`.
        device (`str`): what torch calls it, e.g. `cpu` or `cuda:0`.

    Raises:
        InvalidParameterError: no such model, no language model, no tokenizer, or no such device.
    """
    import torch
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
        AutoModelForSeq2SeqLM,
        AutoTokenizer,
    )

    from ..evaluation.noncausal import model_kind

    classes = {"causal": AutoModelForCausalLM, "masked": AutoModelForMaskedLM, "seq2seq": AutoModelForSeq2SeqLM}
    quiet_libraries()
    with _one_line_errors(name):
        tokenizer = AutoTokenizer.from_pretrained(name)
        config = AutoConfig.from_pretrained(name)
        cls = classes[model_kind(config.architectures or (), config)]
        model = cls.from_pretrained(name, dtype=getattr(torch, dtype))
    try:
        return model.to(device).eval(), tokenizer
    except (RuntimeError, AssertionError) as error:  # torch says so of a device unknown, or not compiled in
        raise InvalidParameterError(f"device {device!r} cannot be used: {_first_line(error)}") from error


@contextmanager
def _one_line_errors(name: str) -> Iterator[None]:
    from safetensors import SafetensorError

    path = Path(name)
    if not path.exists() and (path.is_absolute() or name.startswith(".") or name.count("/") > 1):
        raise InvalidParameterError(f"no such folder: {name}; give a model folder or a Hub id such as org/name")
    try:
        yield
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise InvalidParameterError(f"cannot load {name}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
