"""Key tokens: those that a model predicts much better with a long context than with a short one.

Fang et al., 2024: What is Wrong with Perplexity for Long-context Language Modeling?, https://arxiv.org/abs/2410.23771.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from ...errors import InvalidParameterError
from ...patching import detect_scheme, find_patch
from ...patching.modes import evaluation_mode
from ..protocols.windows import windowed_nll
from ..scoring.boundaries import check_positions
from ..scoring.scorer import TokenScorer, model_name, require_finite
from ..texts.alignment import TokensRead, read_by
from ..texts.documents import Document, as_documents
from ..texts.tokens import TokenizedDocuments, check_vocabulary, tokenize_documents

if TYPE_CHECKING:
    import datasets


class Criterion(NamedTuple):
    """
    What makes a token key; the defaults are the paper's.

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
    """
    The key tokens that one evaluator found, in rows of `length` tokens of the measured models' tokenizer.

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
    """NLL of tokens 1, 2, ... of a row given all tokens before them, and given the nearest few; float64, in nats."""

    long: np.ndarray
    short: np.ndarray

    def keys(self, criterion: Criterion) -> np.ndarray:
        """Indices in the row of the key tokens; the first NLL is that of token 1."""
        gains = self.short - self.long > criterion.alpha
        return np.flatnonzero(gains & (-self.long > criterion.beta)) + 1


def find_key_tokens(
    evaluator: nn.Module,
    tokenizer: Any,
    documents: Sequence[Document] | Sequence[str] | datasets.Dataset | str,
    *,
    length: int,
    start: int = 0,
    evaluator_tokenizer: Any = None,
    alpha: float = 2.0,
    beta: float = -2.0,
    short_length: int = 4096,
    stride: int = 1024,
) -> KeyTokens:
    """
    Tokens that the evaluator predicts well with the long context, and much worse with a short one.

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
    """
    The key tokens of one document.

    Args:
        scorer ([`TokenScorer`]): of the evaluator.
        given ([`TokensRead`]): what it reads.
        index (`int`): of the document.
        criterion ([`Criterion`]): what makes a token key.

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
    """The key tokens of all documents; also the evaluator's NLL of its own tokens given the long context."""
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
    """
    NLL of every token with the long and with the short context.

    Args:
        scorer ([`TokenScorer`]): of a causal language model, patched or not.
        row (`torch.LongTensor` of shape `(tokens,)`): the document.
        id (`str`): its name in messages.
        bos (`int`): tokens of the special prefix, which are never key.
        criterion ([`Criterion`]): its `short_length` and `stride`.

    Raises:
        NonFiniteError: logits are not finite.
    """
    short = windowed_nll(scorer, row, criterion.short_length + criterion.stride, criterion.stride, bos)
    require_finite(short, id, culprit=scorer.culprit)
    long = whole_nll(scorer, row, id)
    return Contrast(long, np.append(long[: len(long) - len(short)], short))


def whole_nll(scorer: TokenScorer, row: torch.Tensor, id: str) -> np.ndarray:
    """NLL of tokens 1, 2, ... of a row given all tokens before them, float64, in nats."""
    nll = scorer.token_nll(row[None])[0].double().numpy()
    require_finite(nll, id, culprit=scorer.culprit)
    return nll


def check_criterion(criterion: Criterion, longest: int) -> None:
    """Refuse thresholds that no token passes, and windows with which no context of `longest` tokens is short."""
    alpha, beta, short_length, stride = criterion
    if not (math.isfinite(alpha) and math.isfinite(beta) and beta < 0):
        raise InvalidParameterError(
            f"alpha is {alpha} and beta {beta}, in nats; give numbers, beta below 0 since it is a log-probability, "
            "as in alpha=2, beta=-2"
        )
    if short_length < 1 or stride < 1 or short_length + stride >= longest:
        raise InvalidParameterError(
            f"short_length is {short_length} and stride {stride}, and rows have up to {longest} tokens, so no context "
            "is short; give positive numbers whose sum is below that, as in short_length=length // 8"
        )


def check_reads(model: nn.Module, rows: Sequence[torch.Tensor]) -> None:
    """Refuse tokens that the model does not have, and positions past the end of a learned table."""
    remedy = "give each model its own tokenizer, the evaluator's as evaluator_tokenizer="
    check_vocabulary(TokenScorer(model).model, rows, evaluator_name(model), remedy)
    patch = find_patch(model)
    check_positions(detect_scheme(model), None if patch is None else patch.plan, max(len(row) for row in rows))


def evaluator_name(model: nn.Module) -> str:
    """What results call a model that finds key tokens: its name, and its patch where it has one."""
    patch, name = find_patch(model), model_name(TokenScorer(model).model)
    return name if patch is None else f"{name}, {patch.plan.method} x{patch.plan.factor:g}"
