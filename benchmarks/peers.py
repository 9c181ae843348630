"""Ways to compute the perplexity of one document: this package's, those of its peers, and a lower bound of the work.

Each way prepares a model and a task, and returns the function to measure. That function returns the mean NLL of the
scored tokens at each length, from which perplexity follows; `floor` returns nothing.

`lm_eval` and `longppl` are the packages on PyPI, called like by their users. The perplexity of `evaluate` is a script
on the Hub, which its wheel does not contain; its formula is repeated here line by line. The same applies to the recipe
in the documentation of transformers. All ways use the same model object. The time in which `evaluate` loads the model
again at every call is not counted.
"""

from __future__ import annotations

import contextlib
import io
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import models
import torch
from torch.nn import CrossEntropyLoss

from hf_posext.evaluation.forwards import Boundaries
from hf_posext.evaluation.protocols import protocol_for
from hf_posext.evaluation.scorer import Memory
from hf_posext.evaluation.tokens import TokenizedDocuments
from hf_posext.patching.detect import model_kind

Run = Callable[[], list[float]]

FLOOR_ROWS = 512
"""Rows per projection in the floor, where matrix products are fastest. With 64 rows, a row takes 1.7 times as long."""


@dataclass(frozen=True)
class Task:
    """
    Case of a measurement.

    Args:
        protocol (`str`): `"prefix"`, `"sliding"` or `"rolling"`.
        row (`torch.LongTensor` of shape `(tokens,)`): the document, on the CPU.
        lengths (`list[int]`): context lengths.
        stride (`int`, *optional*): of sliding windows.
    """

    protocol: str
    row: torch.Tensor
    lengths: list[int]
    stride: int | None = None

    def short(self) -> Task:
        """Return the same task with a few tokens, to warm up."""
        return Task(self.protocol, self.row[:48], [32, 48], self.stride and 16)


def hf_posext(model: Any, task: Task) -> Run:
    """Run the protocol like `evaluate_perplexity` and `compare`, with its check of the model and its guard."""

    def run() -> list[float]:
        protocol = protocol_for(task.protocol, *model_kind(model), task.lengths, stride=task.stride)
        documents = TokenizedDocuments(["random"], task.row[None], bos=False)
        scorer = protocol.scorer(model, None, Memory())
        passes = protocol.passes(task.lengths, Boundaries())
        measurements = [
            measurement for lengths in passes for measurement in protocol.measure(scorer, documents, 0, lengths)
        ]
        return [float(measurement.nll.mean()) for measurement in measurements]

    return run


@torch.inference_mode()
def project(model: Any, task: Task, buffer: torch.Tensor) -> list[float]:
    """Run one forward of the trunk and one projection into a buffer, the least that an exact perplexity needs."""
    hidden = model.model(task.row[None].to(model.device), use_cache=False).last_hidden_state[0]
    for begin in range(0, len(hidden), len(buffer)):
        rows = hidden[begin : begin + len(buffer)]
        torch.mm(rows, model.lm_head.weight.T, out=buffer[: len(rows)])
    return []


def floor(model: Any, task: Task) -> Run:
    weight = model.lm_head.weight
    buffer = torch.zeros(FLOOR_ROWS, len(weight), dtype=weight.dtype, device=weight.device)
    return lambda: project(model, task, buffer)


@torch.no_grad()
def full_logits(model: Any, task: Task) -> list[float]:
    """Return the loss of transformers on each prefix, from a forward per length with the logits of all its tokens."""
    row = task.row[None].to(model.device)
    return [float(model(row[:, :length], labels=row[:, :length]).loss) for length in task.lengths]


def docs_recipe(model: Any, task: Task) -> Run:
    """Run the recipe "Perplexity of fixed-length models" in the documentation of transformers.

    The recipe weighs each window except the first by one token less than it scores. The NLL compared here is that of
    the same windows with the right weights.
    """

    def run() -> list[float]:
        return [
            docs_windows(model, task.row[None].to(model.device), length, task.stride)[0] for length in task.lengths
        ]

    return run


def docs_windows(model: Any, ids: torch.Tensor, max_length: int, stride: int) -> tuple[float, float]:
    """Return the mean NLL per token, and with the weights of the recipe."""
    seq_len = ids.size(1)
    nll_sum, n_tokens, prev_end_loc = torch.tensor(0.0), 0, 0
    exact_sum, exact_tokens = 0.0, 0
    for begin_loc in range(0, seq_len, stride):
        end_loc = min(begin_loc + max_length, seq_len)
        trg_len = end_loc - prev_end_loc
        input_ids = ids[:, begin_loc:end_loc]
        target_ids = input_ids.clone()
        target_ids[:, :-trg_len] = -100
        with torch.no_grad():
            neg_log_likelihood = model(input_ids, labels=target_ids).loss
        num_valid_tokens = (target_ids != -100).sum().item()
        num_loss_tokens = num_valid_tokens - target_ids.size(0)
        nll_sum = nll_sum + neg_log_likelihood.cpu() * num_loss_tokens
        n_tokens += num_loss_tokens
        scored = int((target_ids[:, 1:] != -100).sum())
        exact_sum += float(neg_log_likelihood) * scored
        exact_tokens += scored
        prev_end_loc = end_loc
        if end_loc == seq_len:
            break
    return exact_sum / exact_tokens, float(nll_sum / n_tokens)


@torch.no_grad()
def evaluate_formula(model: Any, task: Task) -> list[float]:
    """Compute `metrics/perplexity` of `evaluate`, one text per length: logits, a shifted copy, and its log-softmax."""
    loss_fct = CrossEntropyLoss(reduction="none")
    means = []
    for length in task.lengths:
        labels = task.row[None, :length].to(model.device)
        mask = torch.ones_like(labels)
        out_logits = model(labels, attention_mask=mask).logits
        shift_logits = out_logits[..., :-1, :].contiguous()
        shift_labels = labels[..., 1:].contiguous()
        shift_mask = mask[..., 1:].contiguous()
        nll = (loss_fct(shift_logits.transpose(1, 2), shift_labels) * shift_mask).sum(1) / shift_mask.sum(1)
        means.append(math.log(torch.exp(nll).mean().item()))
        del out_logits, shift_logits
    return means


def longppl(model: Any, task: Task) -> Run:
    """Run `compute_longppl` of the package without key tokens, for its plain perplexity."""
    from longppl.longppl import compute_longppl

    tokenizer = models.tokenizer(model.config.vocab_size)

    def run() -> list[float]:
        means = []
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):  # "No key tokens!"
            key_tokens = Path(folder) / "key_tokens.txt"
            key_tokens.write_text("")
            for length in task.lengths:
                text = models.words(task.row[:length])
                options = {"evaluator_model": None, "tokenizer": tokenizer, "save_path": key_tokens}
                means.append(math.log(compute_longppl(text, model, **options)["ppl"]))
        return means

    return run


def lm_eval(model: Any, task: Task) -> Run:
    """Run `HFLM.loglikelihood_rolling` once per length. Token 0 is the prefix token that it puts before the text."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    tokenizer = models.tokenizer(model.config.vocab_size)
    rolling = [HFLM(pretrained=model, tokenizer=tokenizer, max_length=length, batch_size=1) for length in task.lengths]
    request = Instance("loglikelihood_rolling", {}, (models.words(task.row[1:]),), 0)

    def run() -> list[float]:
        with contextlib.redirect_stderr(io.StringIO()):  # progress
            return [-lm.loglikelihood_rolling([request])[0] / (len(task.row) - 1) for lm in rolling]

    return run


WAYS: dict[str, Callable[[Any, Task], Run]] = {
    "hf_posext": hf_posext,
    "floor": floor,
    "full logits": lambda model, task: lambda: full_logits(model, task),
    "evaluate": lambda model, task: lambda: evaluate_formula(model, task),
    "longppl": longppl,
    "docs recipe": docs_recipe,
    "lm_eval": lm_eval,
}


def job(way: str, task: dict[str, Any], shape: str, vocabulary: int, tokens: int, device: str = "cpu") -> Run:
    """Return the function of a way on a random model and a random text; see `measure.Job`."""
    model = models.llama(shape, vocabulary, device=device)
    full = Task(row=models.text(tokens, vocabulary), **task)
    WAYS[way](model, full.short())()
    return WAYS[way](model, full)
