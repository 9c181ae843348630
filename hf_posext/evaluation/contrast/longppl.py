"""LongPPL, perplexity of the key tokens alone, and LongCE's weights, which come from the same contrast.

Fang et al., 2024: What is Wrong with Perplexity for Long-context Language Modeling?, https://arxiv.org/abs/2410.23771.
Perplexity over all tokens is mostly that of tokens which a short context predicts as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from ...errors import EvaluationError, InvalidParameterError
from ...patching.modes import evaluation_mode
from ..results.statistics import bootstrap_interval, pooled_perplexity
from ..scoring.scorer import TokenScorer
from ..texts.alignment import read_by
from ..texts.documents import Document, as_documents
from ..texts.tokens import TokenizedDocuments, tokenize_documents
from .key_tokens import Criterion, KeyTokens, check_reads, find_in_rows, whole_nll

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class LongPPL:
    """
    Perplexity of the key tokens of all documents, each weighing the same.

    Args:
        value (`float`): `exp(nll_sum / key_tokens)`.
        ci95 (`list[float]`, *optional*): bootstrap interval over the documents with key tokens; `None` below two.
        nll_sum (`float`): of the key tokens, in nats.
        key_tokens (`int`): how many they are.
        perplexity (`float`): of all tokens but the first of each document, for comparison.
        tokens (`int`): how many those are.
        per_document (`list[dict]`): `document`, `nll_sum`, `key_tokens`, `longppl` (`None` without key tokens),
            `tokens` and `all_nll_sum`.
        left_out (`list[dict]`): `document` and `tokens` of those that are too short.
        keys ([`KeyTokens`]): which tokens count, and how they were found.
    """

    value: float
    ci95: list[float] | None
    nll_sum: float
    key_tokens: int
    perplexity: float
    tokens: int
    per_document: list[dict[str, Any]]
    left_out: list[dict[str, Any]]
    keys: KeyTokens


def longppl(
    model: nn.Module,
    tokenizer: Any,
    documents: Sequence[Document] | Sequence[str] | datasets.Dataset | str,
    *,
    length: int,
    start: int = 0,
    evaluator: nn.Module | None = None,
    evaluator_tokenizer: Any = None,
    keys: KeyTokens | None = None,
    alpha: float = 2.0,
    beta: float = -2.0,
    short_length: int = 4096,
    stride: int = 1024,
    seed: int = 0,
) -> LongPPL:
    """
    LongPPL of a model on the first `length` tokens of each document.

    Two LongPPLs compare only over the same key tokens. Without an evaluator the model, as it is, chooses its own: that
    tells how one model uses its context, and is unfit for comparing methods, since one that reads worse then counts
    fewer tokens. To compare, take one other evaluator that reads `length` well; or find the key tokens once, while one
    method is in force, with [`find_key_tokens`], and give them as `keys` each time. That method is then favoured,
    since `beta` keeps the tokens that it predicts well: say which one it was (`keys.evaluator`).

    Args:
        model (`PreTrainedModel`): a causal language model, patched or not.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        documents (`list[Document]`, or what [`load_documents`] takes): the texts.
        length (`int`): tokens per document, BOS included where the tokenizer adds one.
        start (`int`, *optional*, defaults to 0): tokens to leave out at the beginning of each document (front matter).
        evaluator (`PreTrainedModel`, *optional*): the model that finds the key tokens; by default `model`.
        keys ([`KeyTokens`], *optional*): found before with the same tokenizer, documents, length and start,
            instead of an evaluator and the arguments below.
        evaluator_tokenizer, alpha, beta, short_length, stride: see [`find_key_tokens`].
        seed (`int`, *optional*, defaults to 0): of the bootstrap.

    Raises:
        EvaluationError: not one key token, or logits that are not finite.
        InvalidParameterError: `keys` of another length or other documents, or beside an evaluator; a tokenizer
            without its evaluator; as [`find_key_tokens`].
        DocumentError, UnsupportedModelError: as [`evaluate_perplexity`].
    """
    if keys is not None and evaluator is not None:
        raise InvalidParameterError("keys and evaluator both say which tokens count; give one of them")
    if evaluator is None and evaluator_tokenizer is not None:
        raise InvalidParameterError("evaluator_tokenizer is given without a model; give evaluator=, too, or neither")
    texts = as_documents(documents)
    rows = tokenize_documents(texts, tokenizer, length, start)
    if keys is None:
        given = read_by(evaluator_tokenizer, tokenizer, texts, rows)
        criterion = Criterion(alpha, beta, short_length, stride)
        keys, nll = find_in_rows(evaluator or model, given, rows, criterion)
        if evaluator is None:
            return _pool(rows, nll, keys, seed)
    missing = [id for id in rows.ids if id not in keys.indices]
    if (keys.length, keys.start) != (length, start) or missing:
        raise InvalidParameterError(
            f"the key tokens are of length {keys.length} from token {keys.start} on and lack the documents {missing}, "
            f"and length is {length}, start {start}; find them for the same documents, length and start"
        )
    check_reads(model, list(rows.tokens))
    scorer = TokenScorer(model)
    with evaluation_mode(scorer.model):
        read = tqdm(zip(rows.tokens, rows.ids, strict=True), total=len(rows.ids), unit="doc", disable=None)
        nll = [whole_nll(scorer, row, id) for row, id in read]
    return _pool(rows, nll, keys, seed)


def longce_weights(long_nll: torch.Tensor, short_nll: torch.Tensor, *, cap: float = 5.0) -> torch.Tensor:
    """
    LongCE's soft weight of each token's loss: `min(P(t | long) / P(t | short), cap)`.

    Args:
        long_nll (`torch.Tensor`): NLL of each token given the long context, in nats: the losses of the training step.
        short_nll (`torch.Tensor` of the same shape): NLL given the short context; where
            no context is shorter, the value of `long_nll`, which weighs 1.
        cap (`float`, *optional*, defaults to 5.0): the largest weight, the paper's gamma.

    Returns:
        `torch.Tensor` of the same shape, detached: the loss is `(weights * long_nll).mean()`, and no gradient flows
        through the weights.

    Raises:
        InvalidParameterError: shapes that differ, or a cap that is not positive.
    """
    if long_nll.shape != short_nll.shape:
        raise InvalidParameterError(
            f"long_nll has shape {tuple(long_nll.shape)} and short_nll {tuple(short_nll.shape)}; give the same tokens"
        )
    if not (cap > 0 and math.isfinite(cap)):
        raise InvalidParameterError(f"cap is {cap}; give a positive number, as in cap=5.0")
    return (short_nll.detach() - long_nll.detach()).exp().clamp(max=cap)


def key_sums(nll: np.ndarray, indices: Sequence[int]) -> dict[str, Any]:
    """
    What the key tokens of a document give.

    Args:
        nll (`numpy.ndarray` of shape `(tokens - 1,)`): of tokens 1, 2, ... of its row, in nats.
        indices (`Sequence[int]`): of the key tokens in the row.

    Returns:
        `dict`: `key_nll_sum`, float64, and `key_tokens`, how many they are.
    """
    return {"key_nll_sum": math.fsum(nll[index - 1] for index in indices), "key_tokens": len(indices)}


def longppl_cells(
    records: Sequence[Mapping[str, Any]], control: Sequence[Mapping[str, Any]], length: int, seed: int
) -> dict[str, Any]:
    """
    What the row of a length says of LongPPL.

    Args:
        records (`Sequence[Mapping]`): of a method, with the [`key_sums`] of each document at the longest length, and
            `None` at the others, and where key tokens are not known.
        control (`Sequence[Mapping]`): of the control, with those of the same key tokens; or none.
        length (`int`): of the row.
        seed (`int`): of the bootstrap.

    Returns:
        `dict`: `longppl`, `longppl_ci95`, `longppl_truncated` and `key_tokens`; `None` at a
        length where they are not known, and all but the last without key tokens.
    """
    own, truncated = ([record for record in each if record["length"] == length] for each in (records, control))
    known = any(record["key_tokens"] is not None for record in own)
    sums, counts = _key_columns(own)
    control_sums, _ = _key_columns(truncated)
    return {
        "longppl": float(pooled_perplexity(sums, counts)) if counts else None,
        "longppl_ci95": bootstrap_interval(sums, counts, seed) if counts else None,
        "longppl_truncated": float(pooled_perplexity(control_sums, counts)) if control_sums else None,
        "key_tokens": sum(counts) if known else None,
    }


def _key_columns(records: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[int]]:
    """Sums and counts of the documents that have key tokens."""
    counted = [record for record in records if record["key_tokens"]]
    return [record["key_nll_sum"] for record in counted], [record["key_tokens"] for record in counted]


def _pool(rows: TokenizedDocuments, nll: list[np.ndarray], keys: KeyTokens, seed: int) -> LongPPL:
    per_document: list[dict[str, Any]] = []
    for id, values in zip(rows.ids, nll, strict=True):
        own = key_sums(values, keys.indices[id])
        sums, counts = [own["key_nll_sum"]], [own["key_tokens"]]
        per_document.append(
            {
                "document": id,
                "nll_sum": own["key_nll_sum"],
                "key_tokens": own["key_tokens"],
                "longppl": float(pooled_perplexity(sums, counts)) if own["key_tokens"] else None,
                "tokens": len(values),
                "all_nll_sum": math.fsum(values),
            }
        )
    counted = [record for record in per_document if record["key_tokens"]]
    sums, counts = [record["nll_sum"] for record in counted], [record["key_tokens"] for record in counted]
    all_sums, all_counts = [r["all_nll_sum"] for r in per_document], [r["tokens"] for r in per_document]
    if not counted:
        raise EvaluationError(
            f"none of {sum(all_counts)} tokens is key ({keys.found} of the evaluator's own are): at alpha "
            f"{keys.criterion.alpha:g} and beta {keys.criterion.beta:g}, more than {keys.criterion.short_length} "
            f"tokens of context do not help {keys.evaluator}; use an evaluator that reads longer, or a smaller "
            "short_length"
        )
    return LongPPL(
        value=float(pooled_perplexity(sums, counts)),
        ci95=bootstrap_interval(sums, counts, seed),
        nll_sum=sum(sums),
        key_tokens=sum(counts),
        perplexity=float(pooled_perplexity(all_sums, all_counts)),
        tokens=sum(all_counts),
        per_document=per_document,
        left_out=rows.left_out,
        keys=keys,
    )
