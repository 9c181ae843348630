"""What happens beside the steps: measuring, keeping the plan, stopping at a loss that is none, and a progress bar."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..adapters.save import tell_adapters
from ..errors import InvalidParameterError, TrainingError
from ..evaluation import Document, evaluate_perplexity
from ..evaluation.documents import as_documents
from ..patching import find_patch
from ..plan import PLAN_FILE


@dataclass(frozen=True)
class Evaluation:
    """
    What is measured while a model is trained.

    Args:
        documents (`list[Document]`, or what [`load_documents`] takes): texts that are not trained on.
        lengths (`Sequence[int]`): context lengths in tokens.
        every (`int`): steps between two measurements; before the first step there is one, too.
        start (`int`, *optional*, defaults to 0): tokens to leave out at the beginning of each document.
        passkey (`int`, *optional*, defaults to 0): pass-key trials per length.
    """

    documents: Sequence[Document] | Any
    lengths: Sequence[int]
    every: int
    start: int = 0
    passkey: int = 0

    def __post_init__(self) -> None:
        if self.every < 1 or not self.lengths:
            raise InvalidParameterError(
                f"evaluation every {self.every} steps at lengths {list(self.lengths)}; give 1 or more, and a length"
            )

    @property
    def metric(self) -> str:
        """What early stopping watches: the perplexity at the longest length."""
        return f"eval_perplexity_{max(self.lengths)}"


class MeasuresLengths(TrainerCallback):  # type: ignore[misc]
    """Logs perplexity by length, and pass keys, at each evaluation of the Trainer: `eval_perplexity_4096`,
    `eval_passkey_4096`."""

    def __init__(self, trainer: Trainer, tokenizer: Any, evaluation: Evaluation, seed: int) -> None:
        self.trainer = trainer
        self.tokenizer = tokenizer
        self.evaluation = evaluation
        self.texts = as_documents(evaluation.documents)
        self.seed = seed

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        model: Any,
        **kwargs: Any,
    ) -> None:
        asked = self.evaluation
        results = evaluate_perplexity(
            model,
            self.tokenizer,
            self.texts,
            asked.lengths,
            start=asked.start,
            passkey=asked.passkey,
            seed=self.seed,
            # of a sharded model every process needs its share at every step, so that all of them measure everything
            accelerator=None if self.trainer.is_fsdp_enabled else self.trainer.accelerator,
        )
        found = {f"eval_perplexity_{row['length']}": row["perplexity"] for row in results.rows}
        if asked.passkey:
            found |= {f"eval_passkey_{row['length']}": row["passkey"] for row in results.rows}
        metrics.update(found)  # where the Trainer, and callbacks after this one, look for the best
        self.trainer.log(found)


class KeepsPlan(TrainerCallback):  # type: ignore[misc]
    """Writes the plan of a patched model into every checkpoint of a `Trainer`, as the last of its files.

    The configs in a checkpoint contain the plan already. With this callback a checkpoint that has `posext_plan.json`
    is whole, its tokenizer is the one that [`patch_model`] was given, and prompt learning of PEFT can be saved.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        patch = find_patch(model)
        if patch is not None:
            tell_adapters(model, patch)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        args.distributed_state.wait_for_everyone()
        patch = find_patch(model)
        if patch is not None and state.is_world_process_zero:
            path = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            if patch.tokenizer is not None:
                patch.tokenizer.save_pretrained(path)
            patch.plan.save(path)


class StopsAtNonFinite(TrainerCallback):  # type: ignore[misc]
    """Ends a training whose loss or gradient is not finite before such weights are saved."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **kwargs: Any,
    ) -> None:
        wrong = {name: logs[name] for name in ("loss", "grad_norm") if not math.isfinite(logs.get(name, 0.0))}
        if not wrong:
            return
        kept = newest_checkpoint(Path(args.output_dir))
        told = " and ".join(f"{name} {value}" for name, value in wrong.items())
        raise TrainingError(
            f"{told} at step {state.global_step} of {state.max_steps}; "
            + (f"the last good checkpoint is {kept}" if kept else "no checkpoint was saved before")
            + "; try a lower learning rate or a longer warm-up"
        )


class ShowsProgress(TrainerCallback):  # type: ignore[misc]
    """A progress bar on the main process; transformers' own prints every log."""

    bar: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc="training", unit="step", disable=None
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **kwargs: Any,
    ) -> None:
        if self.bar is not None and "loss" in logs:
            self.bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.bar is not None:
            self.bar.update(1)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.bar is not None:
            self.bar.close()


def newest_checkpoint(directory: Path) -> Path | None:
    """The checkpoint of the most steps that is whole; a training that is killed while it saves leaves half of one."""
    found = [
        (int(step), path)
        for path in directory.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (step := path.name.rpartition("-")[2]).isdecimal() and (path / PLAN_FILE).is_file()
    ]
    return max(found)[1] if found else None
