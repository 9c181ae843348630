"""`transformers.Trainer` as a run wants it; nothing of it is subclassed."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import nn
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from ..patching import Patch
from .callbacks import Evaluation, KeepsPlan, MeasuresLengths, ShowsProgress, StopsAtNonFinite
from .longce import LongCE
from .presets import Preset
from .record import CHECKPOINTS
from .rows import Rows
from .schedule import Collator, Skips, schedule
from .settings import Settings

BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class Run:
    """All that a training is made of, checked."""

    tokenizer: Any
    rows: Rows
    patch: Patch
    preset: Preset
    settings: Settings
    evaluation: Evaluation | None
    output: Path
    arguments: TrainingArguments | None = None


def training_arguments(run: Run, *, resumed: bool, report_to: str) -> TrainingArguments:
    """AdamW (0.9, 0.95) without weight decay, linear warm-up and decay; the loss of every step is logged."""
    settings, evaluation = run.settings, run.evaluation
    measured: dict[str, Any] = {}
    if evaluation is not None:
        measured = {"eval_strategy": "steps", "eval_steps": evaluation.every, "eval_on_start": not resumed}
        if settings.patience is not None:
            measured |= {"metric_for_best_model": evaluation.metric, "greater_is_better": False}
            measured["load_best_model_at_end"] = True
    if run.arguments is not None:
        return _own_arguments(run.arguments, run.output, measured)
    return TrainingArguments(
        output_dir=str(run.output / CHECKPOINTS),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=run.preset.learning_rate,
        warmup_steps=settings.warmup,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        optim="adamw_torch",
        use_cpu=not torch.accelerator.is_available(),  # bfloat16 there only if it is said
        bf16=settings.bf16,
        train_sampling_strategy="sequential",  # the schedule has its own order
        remove_unused_columns=False,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_steps=settings.save_every,
        save_total_limit=2,
        seed=settings.seed,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        report_to=report_to,
        **measured,
    )


def _own_arguments(arguments: TrainingArguments, output: Path, measured: dict[str, Any]) -> TrainingArguments:
    """Arguments of the user, with what a run cannot do without: its directory, its rows as they come, its log."""
    needed = {
        "output_dir": str(output / CHECKPOINTS),
        "train_sampling_strategy": "sequential",
        "remove_unused_columns": False,
        "logging_strategy": IntervalStrategy.STEPS,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        **measured,
    }
    if "eval_strategy" in needed:
        needed["eval_strategy"] = IntervalStrategy.STEPS
    changed = copy.copy(arguments)
    for name, value in needed.items():
        setattr(changed, name, value)
    return changed


def make_trainer(
    run: Run, network: nn.Module, arguments: TrainingArguments, callbacks: Iterable[TrainerCallback]
) -> Trainer:
    """The Trainer of a run, with the callbacks of this package before those of the user."""
    settings, plan, preset = run.settings, run.patch.plan, run.preset
    samples = settings.steps * settings.accumulation * settings.batch_size * arguments.world_size
    skips = None if settings.pose is None else Skips(plan.target_length, settings.pose, settings.seed)
    trainer = Trainer(
        model=network,
        args=arguments,
        data_collator=Collator(skips),
        train_dataset=schedule(run.rows.dataset, samples, settings.seed),
        # the Trainer wants one before it calls those who measure; it has no rows, so that nothing is measured twice
        eval_dataset=None if run.evaluation is None else datasets.Dataset.from_dict({"input_ids": []}),
        compute_loss_func=settings.longce and LongCE(network, settings.longce, run.rows.facts["bos"]),
        optimizers=(None if preset.ratio == 1 or run.arguments else _two_rates(network, preset), None),
    )
    trainer.remove_callback(PrinterCallback)
    own: list[TrainerCallback] = [KeepsPlan(), StopsAtNonFinite(), ShowsProgress()]
    if run.evaluation is not None:
        own.append(MeasuresLengths(trainer, run.tokenizer, run.evaluation, settings.seed))
    if settings.patience is not None:
        own.append(EarlyStoppingCallback(settings.patience))
    for callback in (*own, *callbacks):
        trainer.add_callback(callback)
    return trainer


def _two_rates(network: nn.Module, preset: Preset) -> torch.optim.Optimizer:
    """AdamW with a learning rate of its own for the second LoRA matrices."""
    trained = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
    second = [weight for name, weight in trained.items() if ".lora_B." in name]
    first = [weight for name, weight in trained.items() if ".lora_B." not in name]
    groups: list[dict[str, Any]] = [{"params": first}, {"params": second, "lr": preset.learning_rate * preset.ratio}]
    return torch.optim.AdamW(groups, lr=preset.learning_rate, betas=BETAS, weight_decay=0.0)
