"""Models from a folder or the Hub. Every failure is one line."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import (
    AlreadyPatchedError,
    InvalidParameterError,
    PosExtError,
    UnsupportedModelError,
    first_line,
)
from ..packages import hub_obstacle
from ..plan import ExtensionPlan, has_plan
from ..processes import rank
from .console import say

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from ..patching.checkpoint import Source

ADAPTER_FILE = "adapter_config.json"

Network = TypeVar("Network", bound="torch.nn.Module")


def quiet_libraries() -> None:
    """Keep transformers and datasets from writing between the lines of a table.

    Errors of transformers still show. Errors that datasets logs are also raised, and reported then.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if "datasets" in sys.modules:
        sys.modules["datasets"].logging.set_verbosity(logging.CRITICAL)
    else:  # datasets reads it on import, which takes a second that most commands can save
        os.environ.setdefault("DATASETS_VERBOSITY", "critical")


def load_config(name: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Return the config of a model without its weights."""
    from ..patching.checkpoint import open_config

    with _opening(name, trust_remote_code) as source:
        return open_config(source)


def saved_plan(name: str) -> ExtensionPlan | None:
    """Return the plan of a model that was saved with a patch, or with an adapter trained under one, else `None`.

    The config beside a plan contains the positions under the plan, not those that the model was trained on.
    """
    path = Path(name)
    return ExtensionPlan.load(path) if (path / ADAPTER_FILE).is_file() or has_plan(path) else None


def base_of(name: str) -> str | None:
    """Return the base model that the adapter in a folder names, `None` without an adapter or a name."""
    from ..patching.untrusted import read_json

    path = Path(name) / ADAPTER_FILE
    base = read_json(path).get("base_model_name_or_path") if path.is_file() else None
    return base if isinstance(base, str) and base else None


def require_unpatched(name: str, why: str, instead: str) -> None:
    """Refuse a model with a patch before its weights are read, with the reason of the command and an alternative."""
    plan = saved_plan(name)
    if plan is not None:
        raise AlreadyPatchedError(
            f"{name} was saved with a patch ({plan.describe()}), and {why}. Either {instead}, or pass the model that "
            f"it was made from{f', {base}' if (base := base_of(name)) else ''}."
        )


def load_model(
    name: str, dtype: str, device: str, trust_remote_code: bool = False
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Return a language model (causal, masked or encoder-decoder, by its config) and its tokenizer.

    A model that was saved with a patch, or with an adapter trained under one, is opened under the patch.

    Args:
        name (`str`): a folder, Hub id or GGUF file.
        dtype (`str`): `float32`, `bfloat16`, `float16`, or `auto` for that of the checkpoint.
        device (`str`): device of torch, such as `cpu` or `cuda:0`.
        trust_remote_code (`bool`, *optional*, defaults to `False`): whether code in the checkpoint runs.

    Raises:
        PosExtError: no such model or device, not a language model, no tokenizer, or a broken checkpoint; on one line.
    """
    from ..patching.checkpoint import locate, open_tokenizer

    require_device(device)
    with _opening(name, trust_remote_code) as source:
        # A Trainer may save an adapter without its tokenizer.
        base = None if (Path(name) / "tokenizer_config.json").is_file() else base_of(name)
        tokenizer = open_tokenizer(source if base is None else locate(base, trust_remote_code=trust_remote_code))
        model = _open(source, _dtype(source, dtype))
    return _placed(model, device), tokenizer


def load_body(name: str, dtype: str, device: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """Return a model without its head, which its positions do not depend on. Arguments as in [`load_model`]."""
    from ..patching.checkpoint import open_body

    require_device(device)
    with _opening(name, trust_remote_code) as source:
        weights = _dtype(source, dtype)
        _announce(source, weights)
        body = open_body(source, dtype=weights)
    return _placed(body, device)


def load_4bit(name: str, trust_remote_code: bool) -> tuple[Any, Any]:
    """Return a model quantized while loading, on the GPU of this process, and its tokenizer."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UnsupportedModelError(
            "Expected bitsandbytes for 4-bit weights, which is not installed. Run pip install bitsandbytes, or leave "
            "--load-in-4bit out."
        )
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from ..patching.checkpoint import open_tokenizer, open_weights

    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    place = {"": int(os.environ.get("LOCAL_RANK", 0))}
    with _opening(name, trust_remote_code) as source:
        model = open_weights(AutoModelForCausalLM, source, quantization_config=nf4, device_map=place)
        return model, open_tokenizer(source)


def require_device(device: str) -> None:
    """Refuse, before weights are read, a device that torch cannot use here, or that stores no values (`meta`)."""
    import torch

    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # an unknown device, or one that torch is compiled without
        raise InvalidParameterError(
            f"Expected a device that torch has on this machine, got {device!r}: {first_line(error).rstrip('.')}. "
            "Pass --device cpu."
        ) from error


def _dtype(source: Source, name: str) -> Any:
    """Return a dtype as `from_pretrained` takes it; float32 for `"auto"` of a GGUF file, whose types are quantised."""
    import torch

    if name == "auto":
        return torch.float32 if source.gguf else name
    return getattr(torch, name)


def _placed(model: Network, device: str) -> Network:
    try:
        placed: Network = model.to(device).eval()
    except RuntimeError as error:  # the device exists, so its memory is full
        raise InvalidParameterError(
            f"{type(model).__name__} does not fit on device {device!r}: {first_line(error).rstrip('.')}."
        ) from error
    return placed


def _open(source: Source, dtype: Any) -> PreTrainedModel | PeftModel:
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

    from ..adapters import load_adapter
    from ..patching import load_patched
    from ..patching.checkpoint import open_config, open_weights
    from ..patching.detect import model_kind

    folder = Path(source.name)
    if (folder / ADAPTER_FILE).is_file():
        return load_adapter(folder, dtype=dtype, trust_remote_code=source.trust_remote_code)
    if has_plan(folder):
        return load_patched(folder, dtype=dtype, trust_remote_code=source.trust_remote_code)
    classes = {"causal": AutoModelForCausalLM, "masked": AutoModelForMaskedLM, "seq2seq": AutoModelForSeq2SeqLM}
    config = open_config(source)
    _announce(source, dtype)
    return open_weights(classes[model_kind(config)[0]], source, config, dtype=dtype)


def _announce(source: Source, dtype: Any) -> None:
    """Announce that a GGUF file is being dequantised, which takes minutes."""
    if source.gguf is None or rank():
        return
    from ..patching.untrusted import GGUFHeader

    path = source.gguf_path()
    types = GGUFHeader.read(path).types
    size = f"{path.stat().st_size / 2**20:,.0f} MiB{f' of {types[0]}' if types else ''}"
    say(f"dequantising {source.name} ({size}) to {str(dtype).removeprefix('torch.')}", err=True)


@contextmanager
def _opening(name: str, trust_remote_code: bool) -> Iterator[Source]:
    """Yield the place of a model, which is then opened without progress bars. Any error is one line."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    from ..patching.checkpoint import locate

    path = Path(name)
    gguf = name.lower().endswith(".gguf")  # `locate` refuses it with a reason
    if not path.exists() and not gguf and (path.is_absolute() or name.startswith(".") or name.count("/") > 1):
        raise InvalidParameterError(
            f"Expected a model folder or a Hub id such as org/name, got {name}: no such folder."
        )
    if not path.exists() and not gguf and (obstacle := hub_obstacle(name, "model")):
        raise InvalidParameterError(f"Expected a model, got {name}: {obstacle}. Pass a folder.")
    quiet_libraries()
    try:
        yield locate(name, trust_remote_code=trust_remote_code)
    except PosExtError:
        raise
    except (
        OSError, ValueError, LookupError, ImportError, RuntimeError, SafetensorError, StrictDataclassError
    ) as error:  # fmt: skip
        if "trust_remote_code" in str(error):
            raise InvalidParameterError(
                f"{name} contains code of its own, which is not run. Pass --trust-remote-code if you have read it "
                "and trust its author."
            ) from error
        raise InvalidParameterError(
            f"Cannot load {name}: {first_line(error).rstrip('.')}. Pass a folder with a model and its tokenizer, or "
            "a Hub id such as org/name."
        ) from error
