"""The recipe of the three shipped models: one scheme each, nothing longer than 512 tokens, transformers' Trainer.

Training shows a model positions up to a length and no farther. By default the script takes a few steps on the eight
novels in `examples/data`, far from the shipped weights. Those came from a longer run on one H100 and 163 novels, which
`MODEL_CARD.md` describes: `--steps 2000 --batch-size 64 --accumulation 8 --bf16` with
`--dataset` those novels, and 1,144 steps for `--scheme alibi`.

python examples/pretrain_tiny.py
python examples/pretrain_tiny.py --scheme learned --steps 100
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from hf_posext import evaluate_perplexity, load_documents
from hf_posext.evaluation.prompts import FILLER, NEEDLE, QUESTION, haystack

HERE = Path(__file__).resolve().parent
LENGTH = 512
ANSWER_WEIGHT = 4.0


class Rows(torch.utils.data.Dataset):
    """Row `index` follows from the seed and its number alone. One in eight is synthetic: two thirds of those hide a
    passkey and ask for it, one third repeats a segment. In the labels, a token of an answer has the size of the
    vocabulary added to it, by which `weighted_loss` knows it.
    """

    def __init__(self, documents: Any, tokenizer: Any, count: int, seed: int) -> None:
        self.tokenizer, self.count, self.seed = tokenizer, count, seed
        self.novels = [self.ids(document.text) for document in documents]
        self.sizes = [len(novel) for novel in self.novels]

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        draw = random.Random(f"{self.seed}-{index}")
        kind = draw.choices([self.novel, self.passkey, self.copy], weights=[21, 2, 1])[0]
        row, answer = kind(draw)
        labels = torch.tensor(row)
        labels[answer] += len(self.tokenizer)
        return {"input_ids": torch.tensor(row), "labels": labels}

    def novel(self, draw: random.Random, length: int = LENGTH) -> tuple[list[int], slice]:
        (novel,) = draw.choices(self.novels, weights=self.sizes)
        begin = draw.randint(0, len(novel) - length)
        return novel[begin : begin + length], slice(0)

    def passkey(self, draw: random.Random) -> tuple[list[int], slice]:
        key = f"{draw.randint(10_000, 99_999)}"
        needle, line = self.ids(NEEDLE.format(key=key)), self.ids(FILLER)
        end = self.ids(f"{QUESTION} {key}.")
        room = LENGTH - len(needle) - len(end)
        if draw.random() < 0.5:
            row = haystack(line, room, [(draw.randint(0, room // len(line)), needle)])
        else:
            text, place = self.novel(draw, room)[0], draw.randint(0, room)
            row = [*text[:place], *needle, *text[place:]]
        return row + end, slice(LENGTH - 1 - len(key), LENGTH - 1)  # digits are one token each

    def copy(self, draw: random.Random) -> tuple[list[int], slice]:
        row = self.novel(draw)[0]
        size = draw.randint(16, LENGTH // 4)
        begin = draw.randint(0, LENGTH - 2 * size)
        return row[: LENGTH - size] + row[begin : begin + size], slice(0)


def weighted_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any) -> torch.Tensor:
    """Cross-entropy per token, in which those of an answer weigh `ANSWER_WEIGHT`."""
    logits, labels = outputs.logits[:, :-1].float(), labels[:, 1:]
    vocabulary = logits.shape[-1]
    nll = cross_entropy(logits.transpose(1, 2), labels % vocabulary, reduction="none")
    return (nll * torch.where(labels < vocabulary, 1.0, ANSWER_WEIGHT)).sum() / num_items_in_batch


def optimizer(model: Any) -> torch.optim.AdamW:
    """Weight decay for matrices, and none for embeddings, norms and biases."""
    embeddings = {id(part.weight) for part in model.modules() if isinstance(part, torch.nn.Embedding)}
    decays = {True: [], False: []}
    for weight in model.parameters():
        decays[weight.ndim >= 2 and id(weight) not in embeddings].append(weight)
    groups = [{"params": decays[True], "weight_decay": 0.1}, {"params": decays[False], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=2.5e-3, betas=(0.9, 0.95))


class PrintsLoss(TrainerCallback):
    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" in logs:
            print(f"step {state.global_step:>5,}   loss {logs['loss']:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scheme", choices=["rope", "learned", "alibi"], default="rope")
    parser.add_argument("--dataset", default=HERE / "data" / "train.jsonl")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=4, help="rows of 512 tokens on each device")
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--bf16", action="store_true", help="on a GPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("reports") / "pretrain_tiny")
    options = parser.parse_args()

    set_seed(options.seed)
    shipped = HERE / "tiny" / f"tiny-{options.scheme}"
    tokenizer = AutoTokenizer.from_pretrained(shipped)  # one for all three, used as it is
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(shipped), dtype=torch.float32)
    rows = options.steps * options.batch_size * options.accumulation
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(options.output),
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            gradient_accumulation_steps=options.accumulation,
            warmup_steps=min(200, options.steps // 10),
            lr_scheduler_type="linear",
            bf16=options.bf16,
            use_cpu=not torch.accelerator.is_available(),
            logging_steps=max(1, options.steps // 10),
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=torch.accelerator.is_available(),
            report_to="none",
        ),
        train_dataset=Rows(load_documents(options.dataset), tokenizer, rows, options.seed),
        compute_loss_func=weighted_loss,
        optimizers=(optimizer(model), None),
        callbacks=[PrintsLoss()],
    )
    trainer.remove_callback(PrinterCallback)
    print(f"{options.scheme}: {model.num_parameters():,} parameters, {rows * LENGTH:,} tokens")
    trainer.train()

    lengths = [LENGTH, 2 * LENGTH]
    print(f"\n{'perplexity at':<20}" + "".join(f"{length:>10}" for length in lengths))
    for name, trained in (("this run", model), ("the shipped weights", AutoModelForCausalLM.from_pretrained(shipped))):
        texts = load_documents(HERE / "data" / "heldout.jsonl", limit=2)
        results = evaluate_perplexity(trained.to(model.device, torch.float32), tokenizer, texts, lengths, start=2000)
        print(f"{name:<20}" + "".join(f"{row['perplexity']:>10.1f}" for row in results.rows))
    model.to(torch.bfloat16).save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    print(f"\nsaved: {options.output}")


if __name__ == "__main__":
    main()
