"""Rows, loss, arguments and callbacks of a run with `transformers.Trainer`, which is not subclassed.

Rows have equal lengths and are cut from documents without attention between documents. A sample depends only on the
seed and its number. A run that is resumed, or spread over more processes, therefore reads the same samples.
"""

from __future__ import annotations

import bisect
import copy
import hashlib
import logging
import math
import random
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import (
    EarlyStoppingCallback,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy

from ..errors import DocumentError, InvalidParameterError, TrainingError
from ..evaluation import Document, evaluate_perplexity, longce_weights
from ..evaluation.documents import as_documents
from ..evaluation.tokens import first_scored, special_prefix, token_ids
from ..patching import Patch, find_patch, unwrap
from ..patching.checkpoint import require_vocabulary
from ..patching.modes import evaluation_mode
from ..patching.saved_config import check_resumed, saved_plan, tell_adapters
from ..plan import PLAN_FILE
from .settings import Preset, Settings

logger = logging.getLogger(__name__)

NO_LABEL = -100
"""Label of a token that is not predicted."""

Tokens = list[int]


@dataclass(frozen=True)
class Rows:
    """Rows to train on: `input_ids`, and facts on their origin for the provenance.

    Packed rows have `position_ids`, which restart at 0 with each document, and `labels`, which exclude the first token
    and leading special tokens of each.
    """

    dataset: datasets.Dataset
    facts: dict[str, Any]


def make_rows(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, length: int, *, pack: bool = False
) -> Rows:
    """Cut documents into rows of `length` tokens, each beginning with BOS if the tokenizer adds it.

    A row comes from one document, and the remainder at the end of each document is not used. With `pack`, these
    remainders and the documents shorter than a row share rows. They stay whole and are separated by their positions.
    Texts that do not fill a row raise a `DocumentError`.
    """
    require_vocabulary(tokenizer)
    prefix = special_prefix(tokenizer)
    room = length - len(prefix)
    whole: list[Tokens] = []
    ends: list[Tokens] = []
    sizes = {}
    for document in documents:
        tokens = token_ids(tokenizer, document.text)
        sizes[document.id] = len(prefix) + len(tokens)
        pieces = [prefix + tokens[start : start + room] for start in range(0, len(tokens), room)]
        whole += [piece for piece in pieces if len(piece) == length]
        ends += [piece for piece in pieces if 1 < len(piece) < length]  # a single token has nothing to predict
    packs = _pack(ends, length) if pack else []
    short = [id for id, size in sizes.items() if size < length]
    if not whole and (not pack or sum(map(len, ends)) < length):
        have = f"all of them together have {sum(map(len, ends))}" if pack else f"the longest has {max(sizes.values())}"
        raise DocumentError(
            f"the {len(sizes)} documents do not fill a row of {length} tokens: {have}. Pass longer documents or a "
            "smaller length" + ("" if pack else ", or pack them")
        )
    if short and not pack:
        message = "%d of %d documents are shorter than %d tokens; left out, unless they are packed"
        logger.warning(message, len(short), len(sizes), length)
    used = sum(map(len, whole)) + (sum(map(len, ends)) if pack else 0)
    if pack:
        candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        padding = next(token for token in candidates if token is not None)  # any token: it is not attended to
        dataset = _packed(whole, packs, length, padding, first_scored(len(prefix)))
    else:
        dataset = _columns(input_ids=np.array(whole))
    facts = {
        "documents": sizes,
        "left_out": [] if pack else short,
        "rows": len(dataset),
        "length": length,
        "tokens": used,
        "bos": len(prefix),
        "pack": pack,
        "sha256": hashlib.sha256(np.array(dataset.with_format("numpy")["input_ids"][:]).tobytes()).hexdigest(),
    }
    return Rows(dataset, facts)


def _pack(pieces: list[Tokens], length: int) -> list[list[Tokens]]:
    """Pack pieces into rows by best fit: the longest first, each into the fullest row with enough space."""
    rows: list[list[Tokens]] = []
    spaces: list[tuple[int, int]] = []  # free space of each row, ascending, and the row's index
    for piece in sorted(pieces, key=len, reverse=True):
        position = bisect.bisect_left(spaces, (len(piece), -1))
        if position == len(spaces):
            rows.append([])
            space, index = length, len(rows) - 1
        else:
            space, index = spaces.pop(position)
        rows[index].append(piece)
        bisect.insort(spaces, (space - len(piece), index))
    return rows


def _packed(whole: list[Tokens], packs: list[list[Tokens]], length: int, padding: int, first: int) -> datasets.Dataset:
    count = len(whole) + len(packs)
    ids = np.full((count, length), padding)
    labels = np.full((count, length), NO_LABEL)
    positions = np.zeros((count, length), dtype=np.int64)
    for row, pieces in enumerate([*([piece] for piece in whole), *packs]):
        start = 0
        for piece in pieces:
            end = start + len(piece)
            ids[row, start:end] = piece
            labels[row, start + first : end] = piece[first:]
            positions[row, start:end] = range(len(piece))
            start = end
        positions[row, start:] = range(length - start)  # padding is a document of its own, without labels
    return _columns(input_ids=ids, position_ids=positions, labels=labels)


def _columns(**columns: np.ndarray) -> datasets.Dataset:
    return datasets.Dataset.from_dict(columns).with_format("torch")


def schedule(rows: datasets.Dataset, count: int, seed: int) -> datasets.Dataset:
    """Return `count` rows in training order, with the number of each as `sample`. Each round has its own order."""
    rounds = -(-count // len(rows))
    orders = [np.random.default_rng([seed, number]).permutation(len(rows)) for number in range(rounds)]

    def look_up(batch: dict[str, Any]) -> dict[str, Any]:
        return {**rows[batch["row"]], "sample": batch["sample"]}

    table = {"sample": np.arange(count), "row": np.concatenate(orders)[:count]}
    return datasets.Dataset.from_dict(table).with_transform(look_up)


@dataclass(frozen=True)
class Skips:
    """Positional skip-wise training (PoSE): short rows whose positions are spread over the target length.

    A row is cut into chunks. Each chunk after the first is shifted by a random number of positions, so that many rows
    together cover all distances below `target`. The text of the row stays contiguous. Zhu et al., 2023: PoSE:
    Efficient Context Window Extension of LLMs via Positional Skip-wise Training, https://arxiv.org/abs/2309.10400.

    Args:
        target (`int`): one more than the highest position.
        chunks (`int`): number of chunks in a row.
        seed (`int`): seed of the cuts and skips.
    """

    target: int
    chunks: int
    seed: int

    def positions(self, length: int, sample: int) -> torch.Tensor:
        """Return the positions (length,) of a sample.

        With two chunks, the cut and the skip are distributed as in the paper's code.
        """
        draw = random.Random(f"{self.seed}-{sample}")
        sizes: list[int] = []
        for _ in range(self.chunks - 1):  # each later chunk keeps at least one token
            left = length - sum(sizes) - (self.chunks - 1 - len(sizes))
            sizes.append(min(draw.randint(1, -(-length // self.chunks)), left))
        skips = [0]
        for _ in sizes:
            skips.append(draw.randint(skips[-1], self.target - length))
        sizes.append(length - sum(sizes))
        return torch.arange(length) + torch.repeat_interleave(torch.tensor(skips), torch.tensor(sizes))


@dataclass(frozen=True)
class Collator:
    """Collator of rows into a batch with labels, and with skipped positions if `skips` is given."""

    skips: Skips | None = None
    special: int = 0
    """Number of leading special tokens in each row, which are not predicted."""

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        columns = [name for name in samples[0] if name != "sample"]
        batch = {name: torch.stack([sample[name] for sample in samples]) for name in columns}
        if "labels" not in batch:
            batch["labels"] = batch["input_ids"].clone()
            if self.special > 1:  # the first token is never predicted, and the Trainer counts its label
                batch["labels"][:, : self.special] = NO_LABEL
        if self.skips is not None:
            length = batch["input_ids"].shape[1]
            positions = [self.skips.positions(length, int(sample["sample"])) for sample in samples]
            # without a mask, transformers would take a jump in the positions for the edge of two documents
            mask = torch.ones_like(batch["input_ids"])
            batch |= {"position_ids": torch.stack(positions), "attention_mask": mask}
        return batch


@dataclass
class LongCE:
    """Loss that weights each token by its gain from the long context (LongCE).

    It serves as the `compute_loss_func` of a Trainer whose labels are the input tokens. The short contexts are windows
    of twice `short_length` tokens that advance by `short_length`. Each scored token of a window therefore has
    `short_length` to `2 * short_length - 1` tokens before it. The windows read each token about twice, without
    gradients, in addition to the forward pass over the long row. Tokens of the first window have no shorter context
    and get weight 1.
    Each row and window begins with `bos` special tokens.
    """

    model: nn.Module
    short_length: int
    bos: int

    def __call__(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        nll = token_nll(outputs["logits"], labels)
        weights = longce_weights(nll.detach(), self.short_nll(labels, nll.detach()))
        losses = (weights * nll)[:, first_scored(self.bos) - 1 :]
        share = losses.numel() / nll.numel()  # `num_items_in_batch` also counts the special tokens
        return losses.sum() / (nll.numel() if num_items_in_batch is None else num_items_in_batch) / share

    @torch.no_grad()
    def short_nll(self, ids: torch.Tensor, long_nll: torch.Tensor) -> torch.Tensor:
        """Return the NLL (batch, length - 1) given the short contexts. The first window keeps `long_nll`."""
        short, size = long_nll.clone(), self.short_length
        with evaluation_mode(self.model):
            for begin in range(size, ids.shape[1] - size, size):
                window = ids[:, begin : begin + 2 * size].clone()
                window[:, : self.bos] = ids[:, : self.bos]
                nll = token_nll(self.model(input_ids=window, use_cache=False)["logits"], window)
                scored = nll[:, size - 1 :]  # the first value is that of token 1 of the window
                start = begin + size - 1
                short[:, start : start + scored.shape[1]] = scored
        return short


def token_nll(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return the NLL (batch, length - 1) of tokens 1, 2, ... of each row, in float32."""
    return cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none")


@dataclass(frozen=True)
class Evaluation:
    """Measurements during training.

    Args:
        documents (`list[Document]`, or any form that [`load_documents`] accepts): texts that are not trained on.
        lengths (`Sequence[int]`): context lengths in tokens.
        every (`int`): steps between two measurements. The first measurement precedes the first step.
        start (`int`, *optional*, defaults to 0): tokens to skip at the beginning of each document.
        passkey (`int`, *optional*, defaults to 0): passkey trials per length.
    """

    documents: Sequence[Document] | Any
    lengths: Sequence[int]
    every: int
    start: int = 0
    passkey: int = 0

    def __post_init__(self) -> None:
        if self.every < 1 or not self.lengths:
            raise InvalidParameterError(
                f"Expected 1 or more steps between evaluations and at least one length, got every={self.every} and "
                f"lengths={list(self.lengths)}."
            )

    @property
    def metric(self) -> str:
        """Name of the metric for early stopping: the perplexity at the longest length."""
        return f"eval_perplexity_{max(self.lengths)}"


@dataclass
class MeasuresLengths(TrainerCallback):  # type: ignore[misc]
    """Callback that logs perplexity and passkey retrieval by length at each evaluation of the Trainer.

    The metrics have names such as `eval_perplexity_4096` and `eval_passkey_4096`.
    """

    trainer: Trainer
    tokenizer: PreTrainedTokenizerBase
    evaluation: Evaluation
    texts: Sequence[Document]
    seed: int

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        evaluation = self.evaluation
        results = evaluate_perplexity(
            kwargs["model"],
            self.tokenizer,
            self.texts,
            evaluation.lengths,
            start=evaluation.start,
            passkey=evaluation.passkey,
            seed=self.seed,
            # with FSDP every process has to take part in every forward pass, so all of them measure all documents
            accelerator=None if self.trainer.is_fsdp_enabled else self.trainer.accelerator,
        )
        metrics = {f"eval_perplexity_{row['length']}": row["perplexity"] for row in results.rows}
        if evaluation.passkey:
            metrics |= {f"eval_passkey_{row['length']}": row["passkey"] for row in results.rows}
        kwargs["metrics"].update(metrics)  # read by the Trainer and by later callbacks to find the best
        self.trainer.log(metrics)


class KeepsPlan(TrainerCallback):  # type: ignore[misc]
    """Callback that writes the plan of a patched model into every checkpoint of a `Trainer`, as the last file.

    The configs in a checkpoint already contain the plan. With this callback, a checkpoint that contains
    `posext_plan.json` is complete, its tokenizer is the one given to [`patch_model`], if any, prompt-learning adapters
    of PEFT can be saved, and a run under a patch cannot be resumed with an unpatched model. A patched model itself
    refuses to resume from a checkpoint of another plan.
    """

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        patch, native = find_patch(kwargs["model"]), saved_plan(unwrap(kwargs["model"]).config)
        if state.global_step and (patch is not None or native is None):
            resumed = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            check_resumed(resumed, None if patch is None else patch.plan)
        tell_adapters(kwargs["model"])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        args.distributed_state.wait_for_everyone()
        patch = find_patch(kwargs["model"])
        if patch is not None and state.is_world_process_zero:
            path = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            if patch.tokenizer is not None:
                patch.tokenizer.save_pretrained(path)
            patch.plan.save(path)


class StopsAtNonFinite(TrainerCallback):  # type: ignore[misc]
    """Callback that stops training if the loss or gradient norm is not finite, before such weights are saved."""

    def on_log(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        wrong = {name: logs[name] for name in ("loss", "grad_norm") if not math.isfinite(logs.get(name, 0.0))}
        if not wrong:
            return
        checkpoint = newest_checkpoint(Path(args.output_dir))
        values = " and ".join(f"{name} {value}" for name, value in wrong.items())
        raise TrainingError(
            f"Expected a finite loss, got {values} at step {state.global_step} of {state.max_steps}. "
            + (f"The last good checkpoint is {checkpoint}." if checkpoint else "No checkpoint was saved before.")
            + " Try a lower learning rate or a longer warm-up."
        )


class ShowsProgress(ProgressCallback):  # type: ignore[misc]
    """Progress bar of transformers with the loss beside it, instead of a line for every log."""

    def on_log(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self.training_bar is not None and "loss" in kwargs["logs"]:
            self.training_bar.set_postfix(loss=f"{kwargs['logs']['loss']:.3f}", refresh=False)


def newest_checkpoint(directory: Path) -> Path | None:
    """Return the complete checkpoint with the most steps, or `None`.

    A training that is killed while saving leaves an incomplete checkpoint, without a plan.
    """
    checkpoints = [
        (int(step), path)
        for path in directory.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (step := path.name.rpartition("-")[2]).isdecimal() and (path / PLAN_FILE).is_file()
    ]
    return max(checkpoints)[1] if checkpoints else None


CHECKPOINTS = "checkpoints"
BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class Run:
    """Checked components of a run."""

    tokenizer: PreTrainedTokenizerBase
    rows: Rows
    patch: Patch
    preset: Preset
    settings: Settings
    evaluation: Evaluation | None
    output: Path
    arguments: TrainingArguments | None = None


def training_arguments(run: Run, *, resumed: bool, report_to: str) -> TrainingArguments:
    """Return the arguments of the Trainer: AdamW (0.9, 0.95) without weight decay, linear warm-up and decay.

    The loss of every step is logged. Arguments of the user replace these, except for those that a run requires.
    """
    settings, evaluation = run.settings, run.evaluation
    required: dict[str, Any] = {
        "output_dir": str(run.output / CHECKPOINTS),
        "train_sampling_strategy": "sequential",  # `schedule` has already shuffled the rows
        "remove_unused_columns": False,
        "logging_strategy": IntervalStrategy.STEPS,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
    }
    if evaluation is not None:
        required |= {"eval_strategy": IntervalStrategy.STEPS, "eval_steps": evaluation.every}
        required["eval_on_start"] = not resumed
        if settings.patience is not None:
            required |= {"metric_for_best_model": evaluation.metric, "greater_is_better": False}
            required["load_best_model_at_end"] = True
    if run.arguments is not None:
        changed = copy.copy(run.arguments)
        for name, value in required.items():
            setattr(changed, name, value)
        return changed
    return TrainingArguments(
        **required,
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=run.preset.learning_rate,
        warmup_steps=settings.warmup,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        optim="adamw_torch",
        use_cpu=not torch.accelerator.is_available(),  # bfloat16 on a CPU requires it
        bf16=settings.bf16,
        save_steps=settings.save_every,
        save_total_limit=2,
        seed=settings.seed,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to=report_to,
    )


def make_trainer(
    run: Run, network: nn.Module, arguments: TrainingArguments, callbacks: Iterable[TrainerCallback]
) -> Trainer:
    """Return the Trainer of a run, with the callbacks of this package before those of the user."""
    settings, plan, preset = run.settings, run.patch.plan, run.preset
    samples = settings.steps * settings.accumulation * settings.batch_size * arguments.world_size
    skips = None if settings.pose is None else Skips(plan.target_length, settings.pose, settings.seed)
    trainer = Trainer(
        model=network,
        args=arguments,
        data_collator=Collator(skips, special=0 if settings.longce else run.rows.facts["bos"]),
        train_dataset=schedule(run.rows.dataset, samples, settings.seed),
        # the Trainer needs one to call `on_evaluate`; it has no rows, so that nothing is measured twice
        eval_dataset=None if run.evaluation is None else datasets.Dataset.from_dict({"input_ids": []}),
        compute_loss_func=settings.longce and LongCE(network, settings.longce, run.rows.facts["bos"]),
        optimizers=(None if preset.ratio == 1 or run.arguments else _two_rates(network, preset), None),
    )
    trainer.remove_callback(PrinterCallback)
    package_callbacks: list[TrainerCallback] = [KeepsPlan(), StopsAtNonFinite()]
    if sys.stderr.isatty():
        package_callbacks.append(ShowsProgress())
    if run.evaluation is not None:
        texts = as_documents(run.evaluation.documents)
        package_callbacks.append(MeasuresLengths(trainer, run.tokenizer, run.evaluation, texts, settings.seed))
    if settings.patience is not None:
        package_callbacks.append(EarlyStoppingCallback(settings.patience))
    for callback in (*package_callbacks, *callbacks):
        trainer.add_callback(callback)
    return trainer


def _two_rates(network: nn.Module, preset: Preset) -> torch.optim.Optimizer:
    """Return AdamW with a separate learning rate for the second LoRA matrices."""
    trained = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
    second = [weight for name, weight in trained.items() if ".lora_B." in name]
    first = [weight for name, weight in trained.items() if ".lora_B." not in name]
    groups: list[dict[str, Any]] = [{"params": first}, {"params": second, "lr": preset.learning_rate * preset.ratio}]
    return torch.optim.AdamW(groups, lr=preset.learning_rate, betas=BETAS, weight_decay=0.0)
