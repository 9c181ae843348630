"""Key tokens: those that a model predicts much better with a long context than with a short one.

Fang et al., 2024: What is Wrong with Perplexity for Long-context Language Modeling?, https://arxiv.org/abs/2410.23771.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from ..errors import InvalidParameterError
from ..patching.detect import detect_scheme
from ..patching.modes import evaluation_mode
from .documents import Document, load_documents
from .protocols import windowed_nll
from .scoring import TokenScorer, require_finite
from .setup import check_positions
from .tokens import TokenizedDocuments, adds_bos, tokenize_documents

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
    """

    indices: dict[str, list[int]]
    length: int
    found: int
    evaluator: str
    criterion: Criterion


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
        evaluator_tokenizer (`PreTrainedTokenizerBase`, *optional*): where it is another than `tokenizer`.
        alpha, beta, short_length, stride: see [`Criterion`]; `short_length + stride` is below `length`.

    Raises:
        InvalidParameterError: lengths at which no context is short, a tokenizer without offsets, or another model's.
        DocumentError, UnsupportedModelError, EvaluationError: as [`evaluate_perplexity`].
    """
    texts = as_documents(documents)
    rows = tokenize_documents(texts, tokenizer, length)
    criterion = Criterion(alpha, beta, short_length, stride)
    return find_in_rows(evaluator, tokenizer, texts, rows, evaluator_tokenizer, criterion)[0]


def find_in_rows(
    evaluator: nn.Module,
    tokenizer: Any,
    texts: Sequence[Document],
    rows: TokenizedDocuments,
    evaluator_tokenizer: Any,
    criterion: Criterion,
) -> tuple[KeyTokens, list[np.ndarray]]:
    """The same over rows that are there already; also the evaluator's NLL of its own tokens given the long context."""
    if evaluator_tokenizer in (None, tokenizer):
        contrasts = contrast_rows(evaluator, list(rows.tokens), rows.ids, rows.bos, criterion)
        indices = [contrast.keys(criterion) for contrast in contrasts]
        found = sum(len(keys) for keys in indices)
    else:
        text_of = {document.id: document.text for document in texts}
        bos, first = adds_bos(evaluator_tokenizer), int(rows.bos)
        prefix = [evaluator_tokenizer.bos_token_id] if bos else []
        offsets = [_encode(tokenizer, text_of[id])[1][: rows.length - first] for id in rows.ids]
        covered = [text_of[id][: own[-1, 1]] for id, own in zip(rows.ids, offsets, strict=True)]
        encoded = [_encode(evaluator_tokenizer, text) for text in covered]
        contrasts = contrast_rows(
            evaluator, [torch.tensor(prefix + ids) for ids, _ in encoded], rows.ids, bos, criterion
        )
        indices, found = [], 0
        for text, own, (_, others), contrast in zip(covered, offsets, encoded, contrasts, strict=True):
            keys = contrast.keys(criterion)
            found += len(keys)
            mapped = np.flatnonzero(tokens_inside(own, others[keys - int(bos)], text)) + first
            indices.append(mapped[mapped > 0])  # token 0 of a row is never scored
    by_document = {id: index.tolist() for id, index in zip(rows.ids, indices, strict=True)}
    result = KeyTokens(by_document, rows.length, found, _name(evaluator), criterion)
    return result, [contrast.long for contrast in contrasts]


def contrast_rows(
    model: nn.Module, rows: list[torch.Tensor], ids: list[str], bos: bool, criterion: Criterion
) -> list[Contrast]:
    """
    NLL of every token with the long and with the short context.

    Args:
        model (`PreTrainedModel`): a causal language model, patched or not.
        rows (`list[torch.LongTensor]`): of shape `(tokens,)` each, of any lengths.
        ids (`list[str]`): of their documents, for messages.
        bos (`bool`): whether each row begins with BOS.
        criterion ([`Criterion`]): its `short_length` and `stride`.
    """
    _, _, short_length, stride = criterion
    longest = max(len(row) for row in rows)
    if short_length < 1 or stride < 1 or short_length + stride >= longest:
        raise InvalidParameterError(
            f"short_length is {short_length} and stride {stride}, and rows have up to {longest} tokens, so no context "
            "is short; give positive numbers whose sum is below that, as in short_length=length // 8"
        )
    _check_rows(model, rows)
    scorer, short = TokenScorer(model), []
    # All short windows first: transformers' dynamic NTK keeps the largest base that it has ever needed.
    with evaluation_mode(scorer.model):
        for id, row in zip(ids, tqdm(rows, desc="short context", unit="doc", disable=None), strict=True):
            short.append(windowed_nll(scorer, row, short_length + stride, stride, bos))
            require_finite(short[-1], id)
    return [Contrast(*pair) for pair in zip(long_nll(model, rows, ids), short, strict=True)]


def long_nll(model: nn.Module, rows: list[torch.Tensor], ids: list[str]) -> list[np.ndarray]:
    """NLL of tokens 1, 2, ... of each row given all tokens before them, float64, in nats."""
    _check_rows(model, rows)
    scorer, nll = TokenScorer(model), []
    with evaluation_mode(scorer.model):
        for id, row in zip(ids, tqdm(rows, desc="long context", unit="doc", disable=None), strict=True):
            nll.append(scorer.token_nll(row[None])[0].double().numpy())
            require_finite(nll[-1], id)
    return nll


def tokens_inside(offsets: np.ndarray, spans: np.ndarray, text: str) -> np.ndarray:
    """
    Which tokens lie, but for white space, inside spans of characters.

    Args:
        offsets (`numpy.ndarray` of shape `(tokens, 2)`): first character and one past the last, of each token.
        spans (`numpy.ndarray` of shape `(spans, 2)`): the same, of the spans; in any order, also overlapping.
        text (`str`): what the characters are of.

    Returns:
        `numpy.ndarray` of shape `(tokens,)`, bool. A token that shares no character with the spans is in none of them.
    """
    covered = np.zeros(len(text), dtype=bool)
    for begin, end in spans:
        covered[begin:end] = True
    is_space = np.fromiter((character.isspace() for character in text), dtype=bool, count=len(text))
    inside, outside = (np.concatenate([[0], np.cumsum(mask)]) for mask in (covered, ~covered & ~is_space))
    begins, ends = offsets[:, 0], offsets[:, 1]
    result: np.ndarray = (inside[ends] > inside[begins]) & (outside[ends] == outside[begins])
    return result


def as_documents(documents: Any) -> list[Document]:
    """The texts, loaded where they are not yet."""
    if isinstance(documents, list) and all(isinstance(document, Document) for document in documents):
        return documents
    return load_documents(documents)


def _encode(tokenizer: Any, text: str) -> tuple[list[int], np.ndarray]:
    """Tokens of a text without special ones, and their characters, `(tokens, 2)`."""
    if not tokenizer.is_fast:
        raise InvalidParameterError(
            f"{type(tokenizer).__name__} gives no character offsets, so key tokens cannot be carried between it and "
            "another tokenizer; use a fast tokenizer, or an evaluator with the same tokenizer"
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return encoded["input_ids"], np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)


def _check_rows(model: nn.Module, rows: list[torch.Tensor]) -> None:
    """Refuse tokens that the model does not have, and positions past the end of a learned table."""
    unwrapped = TokenScorer(model).model
    largest, vocabulary = max(int(row.max()) for row in rows), unwrapped.get_input_embeddings().num_embeddings
    if largest >= vocabulary:
        raise InvalidParameterError(
            f"the tokenizer gave token {largest}, and {_name(model)} has {vocabulary}; give each model its own "
            "tokenizer, the evaluator's as evaluator_tokenizer="
        )
    patch = getattr(unwrapped, "_posext_patch", None)
    check_positions(detect_scheme(model), None if patch is None else patch.plan, max(len(row) for row in rows))


def _name(model: nn.Module) -> str:
    unwrapped = TokenScorer(model).model
    name = unwrapped.config.name_or_path or type(unwrapped).__name__
    patch = getattr(unwrapped, "_posext_patch", None)
    return name if patch is None else f"{name}, {patch.plan.method} x{patch.plan.factor:g}"
