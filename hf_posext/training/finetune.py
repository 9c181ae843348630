"""Fine-tuning of a model with extended positions: patch, adapter, training, and a result that any process can load.

| path in `output` | content |
|---|---|
| `adapter` or `model` | the trained weights, with their plan |
| `checkpoints` | the newest two checkpoints of the Trainer |
| `training_log.json` | loss, gradient norm and learning rate of each step, and every evaluation |
| `provenance.json` | base, method, plan, preset, settings, data, seeds, versions, trainable parameters, time |
"""

from __future__ import annotations

import copy
import json
import pickle
import platform
import shlex
import shutil
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import PeftConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import set_seed

from ..adapters import save_adapter
from ..adapters.load import restorer
from ..errors import InvalidParameterError, TrainingError, UnsupportedModelError, first_line, renamed_arguments
from ..evaluation import Document
from ..evaluation.documents import as_documents
from ..evaluation.reading import portable, write_atomically
from ..evaluation.tokens import check_vocabulary
from ..methods import Method
from ..packages import versions_of
from ..patching import Patch, patch_model
from ..patching.long_rows import check_packing, check_skipping, shifted_sparse_attention
from ..patching.modes import activation_checkpointing
from ..plan import ExtensionPlan
from .settings import Preset, Settings, adapter_config, as_preset, tie_again
from .trainer import CHECKPOINTS, Evaluation, Run, make_rows, make_trainer, newest_checkpoint, training_arguments

LOG = "training_log.json"
PROVENANCE = "provenance.json"

PACKAGES = ("hf_posext", "transformers", "peft", "accelerate", "datasets", "torch")

NOT_MEASURED = {"eval_runtime", "train_runtime"}
"""Keys of log entries to leave out: the speed of an evaluation without rows, and of the whole training."""

HALF = (torch.float16, torch.bfloat16)

SETTLED = "`is_gradient_checkpointing` is|Model has `tie_word_embeddings=True`|fan_in_fan_out is set to"
"""Warnings of PEFT on a name that it uses itself, ties that `tie_again` restores, and a setting that it corrects."""


@dataclass(frozen=True)
class Finetuned:
    """Result of a fine-tuning run.

    Args:
        model (`PeftModel` or `PreTrainedModel`): the trained model in evaluation mode, with its patch in force.
        patch (`Patch`): the patch.
        path (`Path`): the saved adapter or model, with its plan.
        log (`list[dict]`): one entry per step, and one per evaluation.
        provenance (`dict`): content of `provenance.json`; empty on processes that do not save.
    """

    model: nn.Module
    patch: Patch
    path: Path
    log: list[dict[str, Any]]
    provenance: dict[str, Any]


@renamed_arguments(original_length="trained_length")
def finetune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document] | Sequence[str] | datasets.Dataset | str,
    method: str | Method | ExtensionPlan | None = None,
    *,
    output: str | Path,
    factor: float | None = None,
    target_length: int | None = None,
    trained_length: int | None = None,
    preset: str | Preset = "lora",
    adapter: PeftConfig | None = None,
    arguments: TrainingArguments | None = None,
    length: int | None = None,
    steps: int = 1000,
    batch_size: int = 1,
    accumulation: int = 8,
    warmup: int | None = None,
    pack: bool = False,
    pose: int | None = None,
    shifted: int | None = None,
    longce: int | None = None,
    bf16: bool = False,
    gradient_checkpointing: bool = False,
    evaluation: Evaluation | None = None,
    patience: int | None = None,
    save_every: int | None = None,
    resume: bool = False,
    seed: int = 0,
    callbacks: Iterable[TrainerCallback] = (),
    report_to: str = "none",
) -> Finetuned:
    """Patch a model, add the adapter of the preset, if any, and train it on long rows with `transformers.Trainer`.

    The patch is applied first and the adapter second. Both stay in force when training ends. If training fails or is
    interrupted, both are removed, and the dtype and `requires_grad` of every weight are restored. Weights of the model
    itself, which presets such as `"full"` train, keep what they have learned. Each sample depends only on the seed and
    its number. A run that is resumed from a checkpoint therefore gives the same weights as an uninterrupted one, to
    the bit if the device is deterministic. Several processes train together under `accelerate launch`; see
    `examples/accelerate_configs`.

    Args:
        model (`PreTrainedModel`): a decoder without a patch or an adapter. Trained weights are kept in float32. A
            model in half precision requires `bf16=True`.
        tokenizer (`PreTrainedTokenizerBase`): tokenizer of the model.
        documents (`list[Document]`, or any form that [`load_documents`] accepts): texts to train on.
        method (`str`, `Method` or `ExtensionPlan`, *optional*): see [`patch_model`]. Required unless the preset has
            its own method, as `nope` does.
        output (`str` or `Path`): directory of the run: a new one, or one to resume.
        factor, target_length, trained_length: see [`patch_model`].
        preset (`str` or `Preset`, *optional*, defaults to `"lora"`): weights to train, and learning rates: `"lora"`,
            `"lora-plus"`, `"dora"`, `"full"`, `"nope"`, or a [`Preset`] such as `replace(PRESETS["lora"], rank=32)`.
        adapter (`PeftConfig`, *optional*): adapter to use instead of the preset's.
        arguments (`TrainingArguments`, *optional*): arguments of the Trainer. They take precedence over the preset's
            learning rate and over `steps`, `batch_size`, `accumulation`, `warmup`, `bf16`, `gradient_checkpointing`,
            `save_every`, `seed` and `report_to`. `output_dir` is replaced by the checkpoints of `output`, and rows are
            read in the order of the schedule.
        length (`int`, *optional*): tokens per row. Defaults to the target length of the plan, or with `pose` to the
            trained length.
        steps (`int`, *optional*, defaults to 1000): optimizer steps.
        batch_size (`int`, *optional*, defaults to 1): rows per process and forward.
        accumulation (`int`, *optional*, defaults to 8): forwards per step.
        warmup (`int`, *optional*): steps until the peak learning rate, which then falls to 0 at the end. Defaults to
            20, at most half of the steps.
        pack (`bool`, *optional*, defaults to `False`): pack texts shorter than a row into shared rows, without
            attention between them. Otherwise, each row is part of one document.
        pose (`int`, *optional*): train on short rows whose skipped positions cover the target length of the plan
            (PoSE): the number of chunks in a row, 2 in the paper. See [`Skips`].
        shifted (`int`, *optional*): attend within groups during training (S2): the number of groups in a row, 4 in
            the paper. See [`shifted_sparse_attention`].
        longce (`int`, *optional*): weight the loss of each token by its gain from the long context over a short one:
            the number of tokens of the short context. See [`LongCE`].
        bf16 (`bool`, *optional*, defaults to `False`): compute in bfloat16 by autocast.
        gradient_checkpointing (`bool`, *optional*, defaults to `False`): save memory for a third more time.
        evaluation ([`Evaluation`], *optional*): measurements before the first step and at regular steps.
        patience (`int`, *optional*): stop after this many evaluations without a lower perplexity at the longest
            length, and return to the best checkpoint.
        save_every (`int`, *optional*): steps between checkpoints, of which the newest two are kept. Defaults to a
            tenth of the steps, or with `patience` to the steps between evaluations.
        resume (`bool`, *optional*, defaults to `False`): resume from the newest complete checkpoint in `output`, if
            any. The settings must be the same.
        seed (`int`, *optional*, defaults to 0): seed of the adapter, the order of rows, and skipped positions.
        callbacks (`Iterable[TrainerCallback]`, *optional*): further callbacks of the Trainer.
        report_to (`str`, *optional*, defaults to `"none"`): tracker, by its name in `TrainingArguments`.

    Returns:
        [`Finetuned`]

    Raises:
        TrainingError: the loss or gradient norm is not finite (the last good checkpoint stays), a checkpoint cannot be
            read, or the run to resume has other settings.
        DocumentError: the texts do not fill a row.
        InvalidParameterError: settings are out of bounds, or the output directory holds files.
        UnsupportedModelError: the model is not a causal language model, does not support `pack`, `pose` or `shifted`,
            or has quantized weights and no adapter to train.
        AlreadyPatchedError, MethodNotApplicableError, UnknownMethodError, NoEffectError: see [`patch_model`].
    """
    preset, output = as_preset(preset), Path(output)
    if arguments is not None:
        if arguments.max_steps < 1:
            raise InvalidParameterError(f"Expected `max_steps` in arguments, got {arguments.max_steps}. Pass it.")
        steps, batch_size = arguments.max_steps, arguments.per_device_train_batch_size
        accumulation, warmup = arguments.gradient_accumulation_steps, arguments.get_warmup_steps(steps)
        bf16, gradient_checkpointing = arguments.bf16, arguments.gradient_checkpointing
        save_every, seed = max(1, int(arguments.save_steps)), arguments.seed
    check_model(model, adapted=adapter is not None or preset.rank is not None, bf16=bf16)
    planned = method.method if isinstance(method, ExtensionPlan) else method
    if preset.method is not None and planned not in (None, preset.method):
        raise InvalidParameterError(f"The preset is for method {preset.method!r}. Leave out method.")
    if method is None and preset.method is None:
        raise InvalidParameterError("Expected a method, got None. Pass a name such as 'yarn', a method or a plan.")
    if patience is not None and evaluation is None:
        raise InvalidParameterError("`patience` requires `evaluation`.")
    texts = as_documents(documents)
    lengths = {"factor": factor, "target_length": target_length, "trained_length": trained_length}
    patch = patch_model(model, method or preset.method, tokenizer=tokenizer, **lengths)  # type: ignore[arg-type]
    restore = restorer(model)
    use_cache = getattr(model.config, "use_cache", None)
    try:
        plan = patch.plan
        settings = Settings(
            length=length or (plan.target_length if pose is None else plan.trained_length),
            steps=steps,
            batch_size=batch_size,
            accumulation=accumulation,
            warmup=min(20, steps // 2) if warmup is None else warmup,
            pack=pack,
            pose=pose,
            shifted=shifted,
            longce=longce,
            bf16=bf16,
            gradient_checkpointing=gradient_checkpointing,
            patience=patience,
            save_every=save_every or (evaluation.every if patience and evaluation else max(1, steps // 10)),
            seed=seed,
        )
        settings.check(plan)
        rows = make_rows(texts, tokenizer, settings.length, pack=pack)
        check_vocabulary(model, rows.dataset["input_ids"])
        if settings.pack:
            check_packing(model)
        if settings.pose is not None:
            check_skipping(model)
        size = sum(weight.numel() for weight in model.parameters())
        network = trainable(model, preset, settings, adapter)
        run = Run(tokenizer, rows, patch, preset, settings, evaluation, output, arguments)
        source = getattr(texts, "source", {})
        if source.get("dataset"):
            source = {**source, "dataset": portable(source["dataset"])}
        facts: dict[str, Any] = {  # everything that determines the trained weights
            "base": portable(model.config.name_or_path) or type(model).__name__,
            "method": plan.method,
            "plan": plan.describe(),
            "preset": asdict(preset),
            "settings": asdict(settings),
            "data": {**source, **rows.facts},
        }
        if adapter is not None:
            facts["adapter"] = {name: str(value) for name, value in adapter.to_dict().items()}
        return _train(run, network, size, facts, resume, callbacks, report_to)
    except BaseException:
        restore()
        patch.undo()
        raise
    finally:
        if use_cache is not None:
            model.config.use_cache = use_cache  # the Trainer turns the cache off
        model.eval()


def _train(
    run: Run,
    network: nn.Module,
    size: int,
    facts: dict[str, Any],
    resume: bool,
    callbacks: Iterable[TrainerCallback],
    report_to: str,
) -> Finetuned:
    checkpoints = run.output / CHECKPOINTS
    checkpoint = newest_checkpoint(checkpoints) if resume else None
    arguments = training_arguments(run, resumed=checkpoint is not None, report_to=report_to)
    with arguments.main_process_first(desc="output"):
        if arguments.should_save:
            check_output(run.output, resume)
            begin(run.output, {**facts, "processes": arguments.world_size})
    trained_size = sum(weight.numel() for weight in network.parameters() if weight.requires_grad)
    began = time.monotonic()
    try:
        trainer = make_trainer(run, network, arguments, callbacks)
        with ExitStack() as modes:
            # accelerate leaves autocast wrapped around the forward of the model
            modes.callback(trainer.accelerator.unwrap_model, network, keep_fp32_wrapper=False)
            if run.settings.shifted is not None:
                modes.enter_context(shifted_sparse_attention(run.patch.model, run.settings.shifted))
            if run.settings.gradient_checkpointing:
                modes.enter_context(activation_checkpointing(run.patch.model))
            trained = trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    except pickle.UnpicklingError as error:  # torch reads checkpoints without running code in them
        raise TrainingError(
            f"{checkpoint} cannot be read: {first_line(error)}. Remove it to resume from the checkpoint before it."
        ) from error
    except BaseException:
        if arguments.should_save and newest_checkpoint(checkpoints) is None:
            forget(run.output)
        raise
    network.eval()
    path = save(network, run.patch, trainer, run.output)
    log = [entry for entry in trainer.state.log_history if not entry.keys() & NOT_MEASURED]
    provenance: dict[str, Any] = {}
    if arguments.should_save:
        result = {
            "path": path.name,
            "steps": trainer.state.global_step,
            "resumed_from": checkpoint and checkpoint.name,
            "seconds": round(time.monotonic() - began, 1),
            "parameters": {"trained": trained_size, "model": size},
            "loss": trained.training_loss,
            "device": str(arguments.device),
        }
        provenance = finish(run.output, result, log)
    arguments.distributed_state.wait_for_everyone()
    return Finetuned(network, run.patch, path, log, provenance)


def check_model(model: nn.Module, *, adapted: bool, bf16: bool) -> None:
    """Refuse a model that cannot be trained. `adapted` is true if an adapter is trained instead of the weights."""
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel) or getattr(model, "_hf_peft_config_loaded", False):
        raise UnsupportedModelError(
            f"Expected a transformers model without an adapter, got {name}. Pass the PreTrainedModel itself, or "
            "model.merge_and_unload() of one with an adapter"
        )
    if model.config.is_encoder_decoder or not model.can_generate():
        raise UnsupportedModelError(
            f"Expected a causal language model, got {name}. Load a decoder: AutoModelForCausalLM.from_pretrained(...)"
        )
    quantized = getattr(model, "is_quantized", False)
    if quantized and not adapted:
        raise UnsupportedModelError(
            f"Expected weights that can be trained, got the quantized ones of {name}. Use an adapter."
        )
    if model.dtype in HALF and not (bf16 or quantized):
        raise InvalidParameterError(
            f"{name} is {str(model.dtype).removeprefix('torch.')}. Pass bf16=True, so that what is trained is kept in "
            "float32, or load the model with dtype=torch.float32"
        )


def trainable(
    model: PreTrainedModel, preset: Preset, settings: Settings, adapter: PeftConfig | None = None
) -> nn.Module:
    """Return the model, or a `PeftModel` around it, ready to train in float32 what the preset trains."""
    set_seed(settings.seed)
    network: nn.Module = model
    if adapter is not None or preset.rank is not None:
        config = adapter_config(preset, model) if adapter is None else copy.deepcopy(adapter)
        if getattr(model, "is_quantized", False):
            checkpointing = settings.gradient_checkpointing
            prepare_model_for_kbit_training(model, checkpointing, {"use_reentrant": False})
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", SETTLED)
                network = get_peft_model(model, config)
        except ValueError as error:
            raise InvalidParameterError(f"peft cannot put the adapter on {type(model).__name__}: {error}") from error
        tie_again(network)
    for weight in network.parameters():
        if weight.requires_grad and weight.dtype in HALF:
            weight.data = weight.data.float()
    return network


def check_output(output: Path, resume: bool) -> None:
    """Refuse an output directory that contains files without a run to resume."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not resume:
        raise InvalidParameterError(
            f"output {output} holds files already. Pass another, or resume=True to resume the run that is there."
        )
    if not (output / PROVENANCE).is_file():
        raise InvalidParameterError(
            f"Expected a run to resume in {output}, got files without {PROVENANCE}. Pass another output=."
        )
    if "result" in _read(output):
        raise InvalidParameterError(
            f"Expected a run to resume in {output}, got one that has ended. Pass another output= to train again."
        )


def begin(output: Path, run: dict[str, Any]) -> None:
    """Write the facts that determine the trained weights, or compare them with those of the run to resume."""
    output.mkdir(parents=True, exist_ok=True)
    run = json.loads(json.dumps(run))
    if not (output / PROVENANCE).is_file():
        versions = {**versions_of(*PACKAGES), "python": platform.python_version()}
        command = shlex.join([Path(sys.argv[0]).name, *map(portable, sys.argv[1:])])
        _write(output, {"run": run, "versions": versions, "command": command})
        return
    before = _read(output).get("run", {})
    changed = [
        f"{name}: {json.dumps(before.get(name))} -> {json.dumps(value)}"
        for name, value in run.items()
        if before.get(name) != value
    ]
    if changed:
        raise TrainingError(
            f"Expected the settings of the run in {output}, got others ({'; '.join(changed)}). Pass the same, or "
            "another output."
        )


def forget(output: Path) -> None:
    """Remove the record of a run that ended before its first checkpoint. The run can then be started again."""
    (output / PROVENANCE).unlink(missing_ok=True)
    for directory in (output / CHECKPOINTS, output):
        if directory.is_dir() and not any(directory.iterdir()):
            directory.rmdir()


def finish(output: Path, result: dict[str, Any], log: list[dict[str, Any]]) -> dict[str, Any]:
    """Write the log and the result of a run, and return the whole provenance."""
    write_atomically(output / LOG, json.dumps(log, indent=1) + "\n")
    provenance = {**_read(output), "result": result}
    _write(output, provenance)
    return provenance


def provenance_of(saved: Path) -> dict[str, Any] | None:
    """Return the provenance of the run that saved an adapter or a model; `None` for any other folder."""
    saved = saved.resolve()
    if not (saved.parent / PROVENANCE).is_file():
        return None
    provenance = _read(saved.parent)
    result = provenance.get("result")
    return provenance if isinstance(result, dict) and result.get("path") == saved.name else None


def _write(output: Path, provenance: dict[str, Any]) -> None:
    write_atomically(output / PROVENANCE, json.dumps(provenance, indent=1) + "\n")


def _read(output: Path) -> dict[str, Any]:
    try:
        provenance = json.loads((output / PROVENANCE).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise TrainingError(f"{output / PROVENANCE} is not JSON: {error}. Pass another output=.") from error
    if not isinstance(provenance, dict):
        raise TrainingError(
            f"Expected an object in {output / PROVENANCE}, got {type(provenance).__name__}. Pass another output=."
        )
    return provenance


def save(network: nn.Module, patch: Patch, trainer: Trainer, output: Path) -> Path:
    """Save an adapter to `output/adapter`, or a model to `output/model`, with its plan, and return the path.

    FSDP shards are gathered in every process.
    """
    adapted = isinstance(network, PeftModel)
    path = output / ("adapter" if adapted else "model")
    if trainer.is_fsdp_enabled:
        _gather(network)
    if trainer.args.should_save:
        # the final name only ever belongs to a complete result
        partial = path.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        if adapted:
            save_adapter(network, partial)
        else:
            patch.save_pretrained(partial)
        partial.rename(path)
    return path


@torch.no_grad()
def _gather(network: nn.Module) -> None:
    """Replace the FSDP shards of a network by whole weights on the CPU. It can no longer be trained."""
    whole: dict[int, nn.Parameter] = {}
    for module in network.modules():
        for name, weight in module.named_parameters(recurse=False):
            if isinstance(weight, DTensor):
                if id(weight) not in whole:  # tied weights stay tied
                    whole[id(weight)] = nn.Parameter(weight.full_tensor().cpu(), requires_grad=weight.requires_grad)
                setattr(module, name, whole[id(weight)])
