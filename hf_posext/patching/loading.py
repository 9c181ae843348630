"""Loading of configs and weights for all commands, with refusal of incomplete or altered checkpoints.

transformers fills weights that a checkpoint lacks with random numbers, opens pickles, asks on the terminal whether to
run a checkpoint's own code, and ignores how a GGUF file scales its positions. Here, each of these is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..errors import CheckpointError, first_line
from .untrusted import GGUFHeader, check_directory, check_shards, pickles_of

GGUF = ".gguf"


@dataclass(frozen=True)
class Source:
    """Location of a model: its name by the user, the folder or Hub id, and the path of a GGUF file in there."""

    name: str
    place: str
    gguf: str | None = None
    trust_remote_code: bool = False

    @property
    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of every `from_pretrained`."""
        gguf = {} if self.gguf is None else {"gguf_file": self.gguf}
        return {"trust_remote_code": self.trust_remote_code, **gguf}

    def gguf_path(self) -> Path:
        """Return the local path of the GGUF file, downloaded from the Hub if necessary."""
        from transformers.utils import cached_file

        return Path(str(cached_file(self.place, self.gguf)))


def locate(name: str | Path, *, trust_remote_code: bool = False) -> Source:
    """Return the location of a model: a folder, a Hub id, a GGUF file, or a file of a Hub id (`"org/name/file.gguf"`).

    A folder whose only weights are one GGUF file stands for that file.

    Raises:
        CheckpointError: no such file, a folder with several GGUF files, or one part of a split file.
    """
    text, path = str(name), Path(name)
    place, gguf = text, None
    if path.is_dir():
        files = sorted(file.name for file in path.iterdir() if file.name.lower().endswith(GGUF))
        if files and not any(path.glob("*.safetensors")):
            if len(files) > 1:
                raise CheckpointError(
                    f"Expected one GGUF file in {text}, got {len(files)}: {', '.join(files)}. "
                    f"Pass one, as {path / files[0]}."
                )
            gguf = files[0]
    elif text.lower().endswith(GGUF):
        parts = text.split("/")
        if path.is_file():
            place, gguf = str(path.parent), path.name
        elif path.is_absolute() or text.startswith(".") or len(parts) < 3 or "\\" in text:
            raise CheckpointError(
                f"no such file: {text}. Pass a GGUF file, or one of a Hub id, as org/name/model.gguf"
            )
        else:
            place, gguf = "/".join(parts[:2]), "/".join(parts[2:])
    if gguf and re.search(r"-\d{5}-of-\d{5}\.gguf$", gguf, re.IGNORECASE):
        raise CheckpointError(
            f"{gguf} is one part of a split GGUF file, which transformers does not read. Merge the parts by "
            "llama-gguf-split --merge, and pass the whole file."
        )
    return Source(text, place, gguf, trust_remote_code)


def open_config(source: Source, **kwargs: Any) -> PreTrainedConfig:
    """Read a config. A GGUF file's gets the architecture and positions of the header, which transformers omits."""
    header = None if source.gguf is None else GGUFHeader.read(source.gguf_path())
    config: PreTrainedConfig = AutoConfig.from_pretrained(source.place, **source.arguments, **kwargs)
    if header is not None:
        config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, "")]
        header.correct_positions(config, source.name)
    return config


def open_tokenizer(source: Source, **kwargs: Any) -> PreTrainedTokenizerBase:
    """Read a tokenizer. A GGUF file without a vocabulary raises a `CheckpointError`."""
    if source.gguf is not None:
        GGUFHeader.read(source.gguf_path()).check_vocabulary(source.name)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source.place, **source.arguments, **kwargs)
    return tokenizer


def open_weights(cls: Any, source: Source, config: PreTrainedConfig | None = None, **kwargs: Any) -> PreTrainedModel:
    """Open a model with all of its weights, from safetensors or a GGUF file.

    Weights in a GGUF file are dequantized, so that the model can be patched, trained and saved like any other.

    Weights that are missing or incomplete, pickles, and shards outside of the folder raise a `CheckpointError`.
    """
    place = Path(source.place)
    if source.gguf is None and place.is_dir():
        check_shards(place)
        if pickles_of(place):  # without any weights, transformers lists the files that it looked for
            check_directory(place, "*.safetensors")
    config = open_config(source) if config is None else config
    if source.gguf is not None and hasattr(transformers, "GgufConfig"):
        kwargs = {"quantization_config": transformers.GgufConfig(dequantize=True), **kwargs}
    try:
        model, loaded = cls.from_pretrained(
            source.place, config=config, use_safetensors=True, output_loading_info=True, **source.arguments, **kwargs
        )
    except (SafetensorError, FileNotFoundError) as error:
        raise CheckpointError(
            f"a weight file of {source.name} is missing or incomplete: {first_line(error)}. Copy it again."
        ) from error
    _check_complete(loaded, source.name)
    if source.gguf is not None:
        if (quantizer := _spent_quantizer(model)) is not None:
            quantizer.remove_quantization_config(model)
        model.config.name_or_path = f"{source.place}/{source.gguf}"  # `locate` finds the file by it
    result: PreTrainedModel = model
    return result


def open_body(source: Source, **kwargs: Any) -> PreTrainedModel:
    """Open a model without its head.

    The model is opened with the head of its architecture, if any, which is then dropped: a body alone may have layers
    that the checkpoint of the whole model does not contain (BERT's pooler).
    """
    config = open_config(source)
    architecture = getattr(transformers, (config.architectures or [""])[0], None)
    whole = isinstance(architecture, type) and issubclass(architecture, PreTrainedModel)
    model = open_weights(architecture if whole else transformers.AutoModel, source, config, **kwargs)
    body: PreTrainedModel = model.base_model
    return body


def _check_complete(loaded: dict[str, Any], name: str) -> None:
    """Refuse a model with weights that the checkpoint lacks. They would be random."""
    missing, unexpected = sorted(loaded["missing_keys"]), sorted(loaded["unexpected_keys"])
    if not missing:
        return
    shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
    instead = f"; it contains {unexpected[0]}, which the model does not have" if unexpected else ""
    raise CheckpointError(
        f"{name} lacks {len(missing)} weight{'s' if len(missing) > 1 else ''} of the model, which would be random: "
        f"{shown}{instead}. Pass a complete checkpoint."
    )


@contextmanager
def serializable(model: PreTrainedModel) -> Iterator[None]:
    """Let transformers save a model that was dequantized from a GGUF file.

    The quantizer stays on the model after it has unpacked every weight, and refuses to save what is no longer
    quantized. It is taken off while the model is saved. Weights that are still packed raise a `CheckpointError`.
    """
    quantizer = _spent_quantizer(model)
    if quantizer is None:
        yield
        return
    names = ("hf_quantizer", "quantization_method", "is_quantized")
    before = {name: vars(model)[name] for name in names if name in vars(model)}
    quantization = getattr(model.config, "quantization_config", None)
    quantizer.remove_quantization_config(model)
    try:
        yield
    finally:
        vars(model).pop("is_quantized", None)
        vars(model).update(before)
        if quantization is not None:
            model.config.quantization_config = quantization


def _spent_quantizer(model: Any) -> Any:
    """Return the quantizer of a GGUF file that has no packed weights left; `None` without one."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None or type(quantizer).__name__ != "GgufHfQuantizer":
        return None
    if getattr(quantizer, "packed_modules", None):
        raise CheckpointError(
            f"{model.config.name_or_path} has weights in GGUF blocks, which cannot be saved as safetensors. Load it "
            "with quantization_config=GgufConfig(dequantize=True)."
        )
    return quantizer
