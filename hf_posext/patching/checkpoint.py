"""Checkpoints: opening of configs and weights for all commands, and saving and opening of patched models.

transformers fills weights that a checkpoint lacks with random numbers, opens pickles, asks on the terminal whether to
run a checkpoint's own code, and ignores how a GGUF file scales its positions. Here, each of these is an error.

A patched model is saved as safetensors and JSON. A patch that replaces a table of positions saves the longer table as
the model's weights, so that plain transformers opens the checkpoint, or what fine-tuning made of it. The rows that it
replaced cannot be computed back from the longer table. They are saved beside the weights, in a folder of their own
where nothing that reads all safetensors of a checkpoint finds them, and put in again when the model is loaded: only
then can that patch be undone, too.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..errors import CheckpointError, PlanError, PlanMismatchError, UnsupportedModelError, first_line
from ..plan import PLAN_FILE, PLAN_KEY, SCHEMA, ExtensionPlan
from .detect import text_config
from .saved_config import LIMITS_KEY, CarriesPlan, open_patched_config, saved_plan
from .sites import LENGTH_FIELDS, positions_ahead, text_configs
from .tables import set_rows, tables_of
from .undo import LastingLog, mix
from .untrusted import GGUFHeader, check_directory, check_shards, pickles_of, read_json

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


NO_TOKENIZER = (
    "Expected a tokenizer with a vocabulary, got one without: its folder lacks the files. Save them there, "
    "tokenizer.save_pretrained(folder), or with the patch, patch_model(model, method, tokenizer=tokenizer)."
)


def open_tokenizer(source: Source, **kwargs: Any) -> PreTrainedTokenizerBase:
    """Read a tokenizer. Without a vocabulary, a GGUF file or a folder raises a `CheckpointError`."""
    if source.gguf is not None:
        GGUFHeader.read(source.gguf_path()).check_vocabulary(source.name)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source.place, **source.arguments, **kwargs)
    except ValueError as error:
        if "instantiate the backend tokenizer" in str(error):  # four lines on ways to build one
            raise CheckpointError(NO_TOKENIZER) from error
        raise
    require_vocabulary(tokenizer)
    return tokenizer


def require_vocabulary(tokenizer: Any) -> None:
    """Refuse a tokenizer without a vocabulary, to which every text is unknown or empty.

    transformers makes such a tokenizer for BERT, GPT-2, T5 and others without a warning if the files are missing. Its
    tokens are special, except for at most one (`▁`).

    Raises:
        CheckpointError: there is no vocabulary.
    """
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        special = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
        if len(tokenizer.get_vocab().keys() - special) < 2:
            raise CheckpointError(NO_TOKENIZER)


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


REPLACED_FILE = "posext_replaced/tables.safetensors"
FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer*", "posext_replaced/*")
"""Files of a patched model that are downloaded from the Hub."""


def upload(
    directory: str | Path,
    repo_id: str,
    plan: ExtensionPlan,
    *,
    files: Sequence[str] | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | bool | None = None,
) -> str:
    """Upload the files of a directory to the Hub in one commit, and return its URL."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=directory,
        allow_patterns=files,
        revision=revision,
        commit_message=commit_message or f"Upload {plan.method} {plan.trained_length} -> {plan.target_length}",
    )
    return str(commit.commit_url)


def save_patched(
    model: PreTrainedModel,
    plan: ExtensionPlan,
    tokenizer: PreTrainedTokenizerBase | None,
    replaced: Mapping[str, torch.Tensor],
    directory: str | Path,
) -> None:
    """Save weights, config, plan, tokenizer, and replaced tables into a new directory."""
    path = new_directory(directory)
    with serializable(model):
        model.save_pretrained(path)
    if plan.changes_nothing:  # the config of such a patch is the model's own, for readers of one generation
        config = copy.deepcopy(model.config)
        config.__class__ = mix(CarriesPlan, type(config))
        config.save_pretrained(path)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
    plan.save(path)
    if replaced:
        (path / REPLACED_FILE).parent.mkdir()
        save_file({name: rows.detach().contiguous() for name, rows in replaced.items()}, path / REPLACED_FILE)


def new_directory(directory: str | Path) -> Path:
    """Create a directory, or accept an empty one. A directory that contains files raises a `FileExistsError`."""
    path = Path(directory)
    if path.exists() and (not path.is_dir() or any(file.suffix != ".lock" for file in path.iterdir())):
        raise FileExistsError(f"{path} exists and is not an empty directory. Choose another, or remove it first.")
    path.mkdir(parents=True, exist_ok=True)
    return path


def refuse_adapter(model: PreTrainedModel) -> None:
    """Refuse a model with the layers of an adapter, which would be saved under their names."""
    if getattr(model, "peft_config", None):
        raise UnsupportedModelError(
            f"{type(model).__name__} has an adapter. Save it by save_adapter(model, path). To merge it into the "
            "weights, call merge_and_unload() of the PeftModel, or of load_adapter(path)"
        )


def open_saved(
    directory: str | Path, **kwargs: Any
) -> tuple[PreTrainedModel, ExtensionPlan, dict[str, torch.Tensor], bool]:
    """Open a saved patched model in its unpatched state, so that its plan can be applied again; see [`load_patched`].

    Returns:
        `tuple`: the model without the patch, the plan, the rows by path of the longer tables as they were saved, and
        whether the tables before the patch were saved, too.
    """
    directory = local_directory(directory, FILES)
    check_directory(directory)
    read_json(directory / "config.json")
    plan = ExtensionPlan.load(directory)
    trusted = bool(kwargs.pop("trust_remote_code", False))
    config = open_patched_config(directory, trust_remote_code=trusted)
    cls = model_class(config, directory, trusted)
    if config.model_type != plan.scheme.model_type and text_config(config).model_type != plan.scheme.model_type:
        raise PlanMismatchError(
            f"the plan in {directory} is for {plan.scheme.model_type}, the weights are {config.model_type}; "
            "put back the plan that was saved with them"
        )
    in_config = saved_plan(config)
    # Directories from before schema 3 contain the plan in its own file alone.
    if in_config is None and not plan.changes_nothing and read_json(directory / PLAN_FILE).get("schema") == SCHEMA:
        raise PlanMismatchError(
            f"{directory} contains {PLAN_FILE}, but the model without a patch was saved there later. Remove the file, "
            "and open the directory with from_pretrained"
        )
    if in_config not in (None, plan):
        raise PlanMismatchError(
            f"{directory} contains two plans, in {PLAN_FILE} and in config.json; put back the one that was saved with "
            "the weights"
        )
    vars(config).pop(PLAN_KEY, None)  # the model has yet to be patched
    if not (plan.table or plan.sinusoids):  # the saved rows are as many as the saved config says
        _restore_shipped(config, plan)
    model = open_weights(cls, Source(str(directory), str(directory), None, trusted), config, **kwargs)
    return model, plan, _put_back(model, plan, directory), (directory / REPLACED_FILE).is_file()


def local_directory(name: str | Path, patterns: Sequence[str]) -> Path:
    """Return a local directory. The files of a Hub id (`user/name`, `user/name@revision`) are downloaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    path = Path(name)
    if path.is_dir():
        return path
    repo_id, _, revision = str(name).partition("@")
    if path.is_absolute() or str(name).startswith(".") or repo_id.count("/") != 1:
        raise CheckpointError(f"no such directory: {name}. Pass the directory that was saved, or a Hub id (user/name)")
    try:
        return Path(snapshot_download(repo_id, revision=revision or None, allow_patterns=list(patterns)))
    except (OSError, HFValidationError) as error:
        raise CheckpointError(
            f"neither a directory nor a repository that can be read: {name} ({first_line(error)})"
        ) from error


def model_class(config: PreTrainedConfig, name: str | Path, trust_remote_code: bool = False) -> Any:
    """Return the class that a config names as its architecture, or the auto class of code that is trusted."""
    architecture = (config.architectures or [""])[0]
    cls = getattr(transformers, architecture, None)
    if trust_remote_code:
        for auto, place in (getattr(config, "auto_map", None) or {}).items():
            if str(place).endswith(f".{architecture}"):
                return getattr(transformers, auto)
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
        raise UnsupportedModelError(f"{name} is of architecture {architecture!r}, which transformers does not have")
    return cls


def _put_back(model: PreTrainedModel, plan: ExtensionPlan, directory: Path) -> dict[str, torch.Tensor]:
    """Put the replaced tables into a model, and return the tables that it had."""
    file, tables = directory / REPLACED_FILE, tables_of(model)
    if not plan.table and not (plan.sinusoids and tables):
        if plan.sinusoids:
            _restore_shipped(model.config, plan)
        return {}
    try:
        replaced = load_file(file) if file.is_file() else _first_rows(model, plan, directory)
    except SafetensorError as error:
        raise CheckpointError(f"{file} is corrupt or incomplete: {first_line(error)}. Copy it again.") from error
    rows = {len(table) for table in replaced.values()}
    fits = replaced.keys() == tables.keys() and all(
        table.shape[1:] == tables[path].weight.shape[1:] for path, table in replaced.items()
    )
    if not fits or len(rows) != 1:
        raise PlanMismatchError(
            f"{file} holds other tables than the weights beside it; put back the one that was saved with them"
        )
    longer: dict[str, torch.Tensor] = {path: module.weight for path, module in tables.items()}
    first = next(iter(tables.values()))
    offset = plan.scheme.table.offset if plan.scheme.table else 0
    if first.num_embeddings != offset + plan.target_length + (positions_ahead(model) if plan.table else 0):
        raise PlanMismatchError(
            f"the plan in {directory} is for {plan.target_length} positions, the weights have a table of "
            f"{first.num_embeddings} rows; put back the plan that was saved with them"
        )
    set_rows(model, {path: table.to(longer[path]) for path, table in replaced.items()}, offset, LastingLog())
    for part in text_configs(model):
        vars(part).pop(LIMITS_KEY, None)  # `set_rows` has restored them
    return longer


def _first_rows(model: PreTrainedModel, plan: ExtensionPlan, directory: Path) -> dict[str, torch.Tensor]:
    """Return stand-ins for the unpatched tables, if the writer of a directory did not save them.

    Sines that transformers makes anew are those that the model had. The rows of a learned table are lost: any rows do
    until the saved ones take their place, and `Patch.undo` refuses.
    """
    tables, made_anew = tables_of(model), model._keys_to_ignore_on_save or ()
    if plan.sinusoids and not all(f"{path}.weight" in made_anew for path in tables):
        raise PlanError(
            f"{directory} lacks {REPLACED_FILE}, the table that the patch replaced, without which it cannot be "
            f"undone; put it back, or open the longer model alone: {type(model).__name__}.from_pretrained(...)"
        )
    shipped = plan.scheme.table.rows if plan.scheme.table else plan.scheme.shipped_length or plan.trained_length
    return {path: module.weight.detach()[:shipped].clone() for path, module in tables.items()}


def _restore_shipped(config: PreTrainedConfig, plan: ExtensionPlan) -> None:
    """Restore the unpatched positions of a config, so that the plan can be applied again."""
    text: Any = text_config(config)
    for entry in plan.rotaries:
        shipped = dict(plan.scheme.rotary(entry.name).shipped)
        text.rope_parameters = {**text.rope_parameters, entry.name: shipped} if entry.name else shipped
    for part in (config, text):  # the second is a copy in encoder-decoder models
        for name, length in vars(part).pop(LIMITS_KEY, _claimed_limits(part, plan)).items():
            setattr(part, name, length)
        if plan.scheme.buckets is not None and hasattr(part, "relative_attention_max_distance"):
            part.relative_attention_max_distance = plan.scheme.buckets.max_distance


def _claimed_limits(config: PreTrainedConfig, plan: ExtensionPlan) -> dict[str, int]:
    """Return the limits of an unpatched config by what its model claims, for writers that did not save them."""
    limit = plan.scheme.shipped_length
    dynamic = [rotary.shipped for rotary in plan.scheme.rotaries if rotary.shipped_type == "dynamic"]
    if dynamic and not any("original_max_position_embeddings" in rotary for rotary in dynamic):
        limit = plan.scheme.trained_length  # what the config contains, from which its frequencies follow
    raised = [name for name in LENGTH_FIELDS if getattr(config, name, None) == plan.target_length]
    return {} if limit is None else dict.fromkeys(raised, limit)
