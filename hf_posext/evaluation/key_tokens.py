"""Key tokens, LongPPL (their perplexity), and LongCE's weights, all from one contrast.

Key tokens are those that a model predicts much better with a long context than with a short one. Fang et al., 2024:
What is Wrong with Perplexity for Long-context Language Modeling?, https://arxiv.org/abs/2410.23771. Perplexity over
all tokens is mostly that of tokens which a short context predicts as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, get_type_hints

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from ..errors import EvaluationError, InvalidParameterError
from ..patching import detect_scheme, find_patch
from ..patching.modes import evaluation_mode
from .config import check_type, checked
from .documents import Document, as_documents
from .memory import check_positions
from .rows import bootstrap_interval, pooled_perplexity
from .scorer import TokenScorer, model_name, require_finite
from .tokens import TokenizedDocuments, TokensRead, check_vocabulary, read_by, tokenize_documents
from .windows import windowed_nll

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase


class Criterion(NamedTuple):
    """Thresholds of a key token. Defaults are the paper's.

    Args:
        alpha (`float`, *optional*, defaults to 2.0): the least gain of the long context, in nats.
        beta (`float`, *optional*, defaults to -2.0): the least log-probability given the long context.
        short_length (`int`, *optional*, defaults to 4096): tokens of the short context.
        stride (`int`, *optional*, defaults to 1024): tokens whose short contexts begin at the same token.
    """

    alpha: float = 2.0
    beta: float = -2.0
    short_length: int = 4096
    stride: int = 1024


@dataclass(frozen=True)
class KeyTokens:
    """Key tokens of one evaluator, in rows of `length` tokens of the measured models' tokenizer.

    Args:
        indices (`dict[str, list[int]]`): of the key tokens in their row (BOS included), ascending, by document.
        length (`int`): tokens per row.
        found (`int`): key tokens of all documents, counted in the evaluator's own tokens.
        evaluator (`str`): its name, and its patch where it had one.
        criterion ([`Criterion`]): what made them key.
        start (`int`, *optional*, defaults to 0): tokens that were left out at the beginning of each document.
    """

    indices: dict[str, list[int]]
    length: int
    found: int
    evaluator: str
    criterion: Criterion
    start: int = 0


class Contrast(NamedTuple):
    """NLL of tokens 1, 2, ... of a row given all earlier tokens, and given the nearest few; float64, in nats."""

    long: np.ndarray
    short: np.ndarray

    def keys(self, criterion: Criterion) -> np.ndarray:
        """Return the indices of the key tokens in the row. The first NLL is that of token 1."""
        gains = self.short - self.long > criterion.alpha
        return np.flatnonzero(gains & (-self.long > criterion.beta)) + 1


@checked
def find_key_tokens(
    evaluator: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document] | Sequence[str] | datasets.Dataset | str,
    *,
    length: int,
    start: int = 0,
    evaluator_tokenizer: PreTrainedTokenizerBase | None = None,
    alpha: float = 2.0,
    beta: float = -2.0,
    short_length: int = 4096,
    stride: int = 1024,
) -> KeyTokens:
    """Find the tokens that an evaluator predicts well with the long context and much worse with a short one.

    Token `t` is key if `log P(t | long) - log P(t | short) > alpha` and `log P(t | long) > beta`. The long context is
    all before it; the short one is what a window of `short_length + stride` tokens that moves by `stride` holds of it,
    `short_length` to `short_length + stride - 1` tokens. These are the paper's windows, but that BOS begins each of
    them where the tokenizer adds one: without it many models collapse, and most tokens would look key. Tokens of the
    first window have no shorter context, and are never key.

    An evaluator with another tokenizer reads the characters that each row of `tokenizer` covers. A token of the row is
    then key if all its characters but white space lie in key tokens of the evaluator, so a token that is longer than
    the evaluator's is key only if each of those is; white space, which tokenizers attach to either side, decides
    nothing. Limits: key tokens of the evaluator at which the two tokenizers cut a word differently can be lost, which
    `KeyTokens.found` shows; a character whose bytes are several tokens makes them key together; both tokenizers must
    give character offsets.

    Args:
        evaluator (`PreTrainedModel`): a causal language model, patched or not, that reads rows of this length well.
        tokenizer (`PreTrainedTokenizerBase`): of the models to measure, in whose tokens the key tokens are given.
        documents (`list[Document]`, or what [`load_documents`] takes): the texts.
        length (`int`): tokens per document, BOS included where the tokenizer adds one.
        start (`int`, *optional*, defaults to 0): tokens to leave out at the beginning of each document (front matter).
        evaluator_tokenizer (`PreTrainedTokenizerBase`, *optional*): where it is another than `tokenizer`.
        alpha, beta, short_length, stride: see [`Criterion`]; `short_length + stride` is below `length`.

    Raises:
        InvalidParameterError: lengths at which no context is short, a tokenizer without offsets, or another model's.
        DocumentError, UnsupportedModelError, EvaluationError: as [`evaluate_perplexity`].
    """
    texts = as_documents(documents)
    rows = tokenize_documents(texts, tokenizer, length, start)
    given = read_by(evaluator_tokenizer, tokenizer, texts, rows)
    return find_in_rows(evaluator, given, rows, Criterion(alpha, beta, short_length, stride))[0]


class Found(NamedTuple):
    """Indices in its row of the key tokens of a document; how many those are in the evaluator's tokens; and the NLL of
    the evaluator's tokens 1, 2, ... given the long context."""

    indices: list[int]
    found: int
    nll: np.ndarray


def find_in_row(scorer: TokenScorer, given: TokensRead, index: int, criterion: Criterion) -> Found:
    """Find the key tokens of one document.

    Raises:
        NonFiniteError: logits are not finite.
    """
    contrast = contrast_row(scorer, given.rows[index], given.ids[index], given.bos, criterion)
    keys = contrast.keys(criterion)
    keys = keys[keys >= max(1, given.bos)]  # a special token in front of the text is not one of it
    return Found(given.carry(index, keys).tolist(), len(keys), contrast.long)


def find_in_rows(
    evaluator: nn.Module, given: TokensRead, rows: TokenizedDocuments, criterion: Criterion
) -> tuple[KeyTokens, list[np.ndarray]]:
    """Find the key tokens of all documents, and the evaluator's NLL of its own tokens given the long context."""
    check_criterion(criterion, max(len(row) for row in given.rows))
    check_reads(evaluator, given.rows)
    scorer = TokenScorer(evaluator)
    with evaluation_mode(scorer.model):
        indices = tqdm(range(len(given.ids)), desc="key tokens", unit="doc", disable=None)
        found = [find_in_row(scorer, given, index, criterion) for index in indices]
    by_document = {id: one.indices for id, one in zip(given.ids, found, strict=True)}
    total = sum(one.found for one in found)
    keys = KeyTokens(by_document, rows.length, total, evaluator_name(scorer.model), criterion, rows.start)
    return keys, [one.nll for one in found]


def contrast_row(scorer: TokenScorer, row: torch.Tensor, id: str, bos: int, criterion: Criterion) -> Contrast:
    """Return the NLL of every token of a document with the long context and with the short one.

    Raises:
        NonFiniteError: logits are not finite.
    """
    short = windowed_nll(scorer, row, criterion.short_length + criterion.stride, criterion.stride, bos)
    require_finite(short, id, culprit=scorer.culprit)
    long = whole_nll(scorer, row, id)
    return Contrast(long, np.append(long[: len(long) - len(short)], short))


def whole_nll(scorer: TokenScorer, row: torch.Tensor, id: str) -> np.ndarray:
    """Return the NLL of tokens 1, 2, ... of a row given all earlier tokens, float64, in nats."""
    nll = scorer.token_nll(row[None])[0].double().numpy()
    require_finite(nll, id, culprit=scorer.culprit)
    return nll


def check_criterion(criterion: Criterion, longest: int) -> None:
    """Refuse thresholds that no token passes, and windows with which no context of `longest` tokens is short."""
    alpha, beta, short_length, stride = criterion
    for name, hint in get_type_hints(Criterion).items():
        check_type(name, getattr(criterion, name), hint)
    if not (math.isfinite(alpha) and math.isfinite(beta) and beta < 0):
        raise InvalidParameterError(
            f"alpha is {alpha} and beta {beta}, in nats. Pass numbers, beta below 0 since it is a log-probability, "
            "as in alpha=2, beta=-2."
        )
    if short_length < 1 or stride < 1 or short_length + stride >= longest:
        raise InvalidParameterError(
            f"short_length is {short_length} and stride {stride}, and rows have up to {longest} tokens, so no context "
            "is short. Pass positive numbers whose sum is below that, as in short_length=length // 8."
        )


def check_reads(model: nn.Module, rows: Sequence[torch.Tensor]) -> None:
    """Refuse tokens that the model does not have, and positions past the end of a learned table."""
    remedy = "give each model its own tokenizer, the evaluator's as evaluator_tokenizer="
    check_vocabulary(TokenScorer(model).model, rows, evaluator_name(model), remedy)
    patch = find_patch(model)
    check_positions(detect_scheme(model), None if patch is None else patch.plan, max(len(row) for row in rows))


def evaluator_name(model: nn.Module) -> str:
    """Return the name of an evaluator in results, with its patch if it has one."""
    patch, name = find_patch(model), model_name(TokenScorer(model).model)
    return name if patch is None else f"{name}, {patch.plan.method} x{patch.plan.factor:g}"


@dataclass(frozen=True)
class LongPPL:
    """LongPPL: perplexity of the key tokens of all documents, equally weighted.

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


@checked
def longppl(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document] | Sequence[str] | datasets.Dataset | str,
    *,
    length: int,
    start: int = 0,
    evaluator: nn.Module | None = None,
    evaluator_tokenizer: PreTrainedTokenizerBase | None = None,
    keys: KeyTokens | None = None,
    alpha: float = 2.0,
    beta: float = -2.0,
    short_length: int = 4096,
    stride: int = 1024,
    seed: int = 0,
) -> LongPPL:
    """Measure the LongPPL of a model on the first `length` tokens of each document.

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
        raise InvalidParameterError("keys and evaluator both say which tokens count. Pass one of them.")
    if evaluator is None and evaluator_tokenizer is not None:
        raise InvalidParameterError("evaluator_tokenizer is given without a model. Pass evaluator=, too, or neither.")
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
            f"and length is {length}, start {start}. Find them for the same documents, length and start."
        )
    check_reads(model, list(rows.tokens))
    scorer = TokenScorer(model)
    with evaluation_mode(scorer.model):
        read = tqdm(zip(rows.tokens, rows.ids, strict=True), total=len(rows.ids), unit="doc", disable=None)
        nll = [whole_nll(scorer, row, id) for row, id in read]
    return _pool(rows, nll, keys, seed)


@checked
def longce_weights(long_nll: torch.Tensor, short_nll: torch.Tensor, *, cap: float = 5.0) -> torch.Tensor:
    """Return LongCE's soft weight of each token's loss: `min(P(t | long) / P(t | short), cap)`.

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
            f"long_nll has shape {tuple(long_nll.shape)} and short_nll {tuple(short_nll.shape)}. Pass the same tokens."
        )
    if not (cap > 0 and math.isfinite(cap)):
        raise InvalidParameterError(f"cap is {cap}. Pass a positive number, as in cap=5.0.")
    return (short_nll.detach() - long_nll.detach()).exp().clamp(max=cap)


def key_sums(nll: np.ndarray, indices: Sequence[int]) -> dict[str, Any]:
    """Sums over the key tokens of a document: `key_nll_sum`, float64, and how many they are. `nll` is of tokens 1, 2,
    ... of its row."""
    return {"key_nll_sum": math.fsum(nll[index - 1] for index in indices), "key_tokens": len(indices)}


def longppl_cells(
    records: Sequence[Mapping[str, Any]], control: Sequence[Mapping[str, Any]], length: int, seed: int
) -> dict[str, Any]:
    """Return the LongPPL entries of a row; `None` if key tokens are unknown.

    Records contain the [`key_sums`] of each document at the longest length, and `None` at the others.
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
    """Return the sums and counts of the documents that have key tokens."""
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
            f"tokens of context do not help {keys.evaluator}. Use an evaluator that reads longer, or a smaller "
            "short_length."
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
