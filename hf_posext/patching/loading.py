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
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..errors import CheckpointError
from .untrusted import GGUFHeader, check_directory, check_shards, pickles_of

GGUF = ".gguf"


@dataclass(frozen=True)
class Source:
    """Location of a model: a folder or Hub id, and its GGUF file if it has one.

    Attributes:
        name (`str`): the model as the user named it.
        place (`str`): folder or Hub id.
        gguf (`str`, *optional*): path of the GGUF file inside `place`.
        trust_remote_code (`bool`, *optional*, defaults to `False`): whether the checkpoint's own Python code runs.
    """

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
        """Return the local path of the GGUF file, downloaded from the Hub if necessary.

        Raises:
            OSError: no such file, or no connection.
        """
        from transformers.utils import cached_file

        return Path(str(cached_file(self.place, self.gguf)))


def locate(name: str | Path, *, trust_remote_code: bool = False) -> Source:
    """Return the place of a model by its name.

    Args:
        name (`str` or `Path`): a folder, a Hub id, a GGUF file, a folder whose only weights are one GGUF file, or a
            Hub id and a file in it, as `"org/name/model.gguf"`.
        trust_remote_code (`bool`, *optional*, defaults to `False`): whether the checkpoint's own Python code runs.

    Raises:
        CheckpointError: no such file, a folder with several GGUF files, or one part of a split file.
    """
    text, path = str(name), Path(name)
    if path.is_dir():
        files = sorted(file.name for file in path.iterdir() if file.name.lower().endswith(GGUF))
        if not files or any(path.glob("*.safetensors")):
            return Source(text, text, None, trust_remote_code)
        if len(files) > 1:
            raise CheckpointError(
                f"Expected one GGUF file in {text}, got {len(files)}: {', '.join(files)}. "
                f"Pass one, as {path / files[0]}."
            )
        return Source(text, text, _whole(files[0]), trust_remote_code)
    if not text.lower().endswith(GGUF):
        return Source(text, text, None, trust_remote_code)
    if path.is_file():
        return Source(text, str(path.parent), _whole(path.name), trust_remote_code)
    parts = text.split("/")
    if path.is_absolute() or text.startswith(".") or len(parts) < 3 or "\\" in text:
        raise CheckpointError(f"no such file: {text}. Pass a GGUF file, or one of a Hub id, as org/name/model.gguf")
    return Source(text, "/".join(parts[:2]), _whole("/".join(parts[2:])), trust_remote_code)


def _whole(file: str) -> str:
    if re.search(r"-\d{5}-of-\d{5}\.gguf$", file, re.IGNORECASE):
        raise CheckpointError(
            f"{file} is one part of a split GGUF file, which transformers does not read. Merge the parts by "
            "llama-gguf-split --merge, and pass the whole file."
        )
    return file


def open_config(source: Source, **kwargs: Any) -> PreTrainedConfig:
    """Read a config, from the header alone where the model is a GGUF file.

    Args:
        source (`Source`): as [`locate`] returns it.
        kwargs: passed to `AutoConfig.from_pretrained` (`revision`, ...).

    Returns:
        [`PreTrainedConfig`]: of a GGUF file with the architecture and the positions, which transformers leaves out.

    Raises:
        CheckpointError: the GGUF file scales positions in a way that transformers cannot express.
        OSError, ValueError: as of transformers.
    """
    header = None if source.gguf is None else GGUFHeader.read(source.gguf_path())
    config: PreTrainedConfig = AutoConfig.from_pretrained(source.place, **source.arguments, **kwargs)
    if header is not None:
        config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, "")]
        header.correct_positions(config, source.name)
    return config


def open_tokenizer(source: Source, **kwargs: Any) -> PreTrainedTokenizerBase:
    """Read a tokenizer, from the GGUF file where the model is one.

    Args:
        source (`Source`): as [`locate`] returns it.
        kwargs: passed to `AutoTokenizer.from_pretrained`.

    Raises:
        CheckpointError: the GGUF file has no vocabulary.
        OSError, ValueError: as of transformers.
    """
    if source.gguf is not None:
        GGUFHeader.read(source.gguf_path()).check_vocabulary(source.name)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source.place, **source.arguments, **kwargs)
    return tokenizer


def open_weights(cls: Any, source: Source, config: PreTrainedConfig | None = None, **kwargs: Any) -> PreTrainedModel:
    """Open a model with all of its weights, from safetensors or a GGUF file.

    Weights in a GGUF file are dequantised, so that the model can be patched, trained and saved like any other.

    Args:
        cls (`type`): a model class, or an `AutoModel` class.
        source (`Source`): as [`locate`] returns it.
        config (`PreTrainedConfig`, *optional*): as [`open_config`] returns it; read here by default.
        kwargs: passed to `from_pretrained` (`dtype`, `device_map`, ...).

    Raises:
        CheckpointError: weights are missing, or only pickles hold them.
        OSError, ValueError: as of transformers.
    """
    check_weights(source.place if source.gguf is None else None)
    config = open_config(source) if config is None else config
    if source.gguf is not None and hasattr(transformers, "GgufConfig"):
        kwargs = {"quantization_config": transformers.GgufConfig(dequantize=True), **kwargs}
    model, loaded = cls.from_pretrained(
        source.place, config=config, use_safetensors=True, output_loading_info=True, **source.arguments, **kwargs
    )
    check_loaded(loaded, source.name)
    if source.gguf is not None:
        if (quantizer := _spent_quantizer(model)) is not None:
            quantizer.remove_quantization_config(model)
        model.config.name_or_path = f"{source.place}/{source.gguf}"  # `locate` finds the file by it
    result: PreTrainedModel = model
    return result


def open_body(source: Source, **kwargs: Any) -> PreTrainedModel:
    """Open a model without its head.

    The model is opened with the head of its architecture where it has one, which is then left out: a body alone may
    have layers that the checkpoint of the whole model does not contain (BERT's pooler).

    Args:
        source (`Source`): as [`locate`] returns it.
        kwargs: passed to `from_pretrained`.

    Raises:
        CheckpointError, OSError, ValueError: as [`open_weights`].
    """
    config = open_config(source)
    architecture = getattr(transformers, (config.architectures or [""])[0], None)
    whole = isinstance(architecture, type) and issubclass(architecture, PreTrainedModel)
    model = open_weights(architecture if whole else transformers.AutoModel, source, config, **kwargs)
    body: PreTrainedModel = model.base_model
    return body


def check_weights(place: str | Path | None) -> None:
    """Refuse a folder whose weights only pickle would open, or whose index names files outside of it.

    Args:
        place (`str` or `Path`, *optional*): a folder; anything else is not looked at.

    Raises:
        CheckpointError: says which file, and why.
    """
    if place is None or not Path(place).is_dir():
        return
    check_shards(Path(place))
    if pickles_of(Path(place)):  # without any weights, transformers names the files that it looked for
        check_directory(place, "*.safetensors")


def check_loaded(loaded: dict[str, Any], name: str | Path) -> None:
    """Refuse a model of which weights were not in the checkpoint, and are random.

    Args:
        loaded (`dict[str, Any]`): as `from_pretrained(..., output_loading_info=True)` returns it.
        name (`str` or `Path`): the checkpoint, for the message.

    Raises:
        CheckpointError: names missing weights.
    """
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
    """Let transformers save a model that was dequantised from a GGUF file.

    The quantiser stays on the model after it has unpacked every weight, and refuses to save what is no longer
    quantised. It is taken off while the model is saved.

    Args:
        model (`PreTrainedModel`): any model; one without such a quantiser is left alone.

    Raises:
        CheckpointError: weights are still packed in GGUF blocks.
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
    """Return the quantiser of a GGUF file that has no packed weights left; `None` without one."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None or type(quantizer).__name__ != "GgufHfQuantizer":
        return None
    if getattr(quantizer, "packed_modules", None):
        raise CheckpointError(
            f"{model.config.name_or_path} has weights in GGUF blocks, which cannot be saved as safetensors. Load it "
            "with quantization_config=GgufConfig(dequantize=True)."
        )
    return quantizer
