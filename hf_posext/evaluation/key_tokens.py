"""Key tokens, LongPPL (their perplexity), and LongCE weights, from one contrast.

Key tokens are those that a model predicts much better with a long context than with a short one. Most other tokens are
predicted just as well with a short context, and they dominate perplexity over all tokens. Source: Fang et al., 2024,
What is Wrong with Perplexity for Long-context Language Modeling?, https://arxiv.org/abs/2410.23771.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from ..decode import short
from ..errors import EvaluationError, InvalidParameterError
from ..patching import detect_scheme, find_patch
from ..patching.modes import evaluation_mode
from .config import Criterion, check_criterion, checked, default_criterion
from .documents import Document, as_documents
from .forwards import check_positions
from .rows import bootstrap_interval, columns_of, key_sums, pooled_perplexity
from .runner import RunJournal, measure
from .scorer import TokenScorer, model_name, require_finite, token_scorer
from .setup import Request, Setup
from .tasks import MethodRun, Stage, Task, task_of
from .tokens import TokenizedDocuments, TokensRead, check_vocabulary, read_by, tokenize_documents
from .windows import sliding_windows, windows_nll

if TYPE_CHECKING:
    import datasets
    from accelerate import Accelerator
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class KeyTokens:
    """Key tokens of one evaluator, in rows of `length` tokens of the measured models' tokenizer.

    Args:
        indices (`dict[str, list[int]]`): indices of the key tokens in each document's row (BOS included), ascending.
        length (`int`): tokens per row.
        found (`int`): number of key tokens in all documents, counted in the evaluator's own tokens.
        evaluator (`str`): name of the evaluator, with its patch if it had one.
        criterion ([`Criterion`]): thresholds of the search.
        start (`int`, *optional*, defaults to 0): tokens skipped at the beginning of each document.
    """

    indices: dict[str, list[int]]
    length: int
    found: int
    evaluator: str
    criterion: Criterion
    start: int = 0


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
    all earlier tokens. The short context is the part of it inside a window of `short_length + stride` tokens that
    moves by `stride`, which is `short_length` to `short_length + stride - 1` tokens. These are the paper's windows,
    except that each of them begins with BOS if the tokenizer adds one. Without BOS many models collapse, and most
    tokens would look key. Tokens of the first window have no shorter context and are never key.

    An evaluator with a different tokenizer reads the characters that each row of `tokenizer` covers. A token of the
    row is then key if all of its characters, except for white space, lie in key tokens of the evaluator. A token that
    spans several of the evaluator's tokens is key only if each of them is. White space is ignored because tokenizers
    attach it to either side. Limits:

    - Key tokens of the evaluator can be lost where the two tokenizers split a word differently. `KeyTokens.found`
      reports the number before this loss.
    - If the bytes of a character span several tokens, these tokens are key together.
    - Both tokenizers must return character offsets.

    Args:
        evaluator (`PreTrainedModel`): a causal language model, patched or not, that reads rows of this length well.
        tokenizer (`PreTrainedTokenizerBase`): tokenizer of the models to measure. Key tokens are indices of its
            tokens.
        documents (`list[Document]`, or what [`load_documents`] takes): the texts.
        length (`int`): tokens per document, including BOS if the tokenizer adds one.
        start (`int`, *optional*, defaults to 0): tokens to skip at the beginning of each document (front matter).
        evaluator_tokenizer (`PreTrainedTokenizerBase`, *optional*): tokenizer of the evaluator. Defaults to
            `tokenizer`.
        alpha, beta, short_length, stride: see [`Criterion`]. `short_length + stride` must be below `length`.

    Returns:
        [`KeyTokens`]: the key tokens of each document.

    Raises:
        InvalidParameterError: no context is short at these lengths, a tokenizer returns no offsets, or a tokenizer
            belongs to another model.
        DocumentError, UnsupportedModelError, EvaluationError: see [`evaluate_perplexity`].
    """
    texts = as_documents(documents)
    rows = tokenize_documents(texts, tokenizer, length, start)
    tokens = read_by(evaluator_tokenizer, tokenizer, texts, rows)
    return _find(evaluator, tokens, rows, Criterion(alpha, beta, short_length, stride))[0]


class Contrast(NamedTuple):
    """Key tokens of one document.

    Args:
        keys (`np.ndarray` of shape `(key tokens,)`): their indices in the evaluator's row, ascending.
        long (`np.ndarray` of shape `(tokens - 1,)`): NLL of tokens 1, 2, ... given all earlier tokens; float64, nats.
        short (`np.ndarray` of the same shape): NLL given the short context.
    """

    keys: np.ndarray
    long: np.ndarray
    short: np.ndarray


def contrast_row(scorer: TokenScorer, row: torch.Tensor, id: str, bos: int, criterion: Criterion) -> Contrast:
    """Return the key tokens of a row that begins with `bos` special tokens, or refuse logits that are not finite."""
    windows = sliding_windows(len(row), criterion.short_length + criterion.stride, criterion.stride, bos)
    short = windows_nll(scorer, row, windows)
    require_finite(short, id, culprit=scorer.culprit)
    long = whole_nll(scorer, row, id)
    short = np.append(long[: len(long) - len(short)], short)
    keys = 1 + np.flatnonzero((short - long > criterion.alpha) & (-long > criterion.beta))  # the first is token 1
    return Contrast(keys[keys >= max(1, bos)], long, short)  # the special prefix is not part of the text


def find_in_row(
    scorer: TokenScorer, tokens: TokensRead, index: int, criterion: Criterion
) -> tuple[list[int], Contrast]:
    """Return the indices of a document's key tokens in the row of the measured models, and their contrast."""
    contrast = contrast_row(scorer, tokens.rows[index], tokens.ids[index], tokens.bos, criterion)
    return tokens.carry(index, contrast.keys).tolist(), contrast


def _find(
    evaluator: nn.Module, tokens: TokensRead, rows: TokenizedDocuments, criterion: Criterion
) -> tuple[KeyTokens, list[np.ndarray]]:
    """Return the key tokens of all documents, and the evaluator's NLL of its own tokens given the long context."""
    check_criterion(criterion, max(len(row) for row in tokens.rows))
    check_reads(evaluator, tokens.rows)
    scorer = TokenScorer(evaluator)
    with evaluation_mode(scorer.model):
        progress = tqdm(range(len(tokens.ids)), desc="key tokens", unit="doc", disable=None)
        results = [find_in_row(scorer, tokens, index, criterion) for index in progress]
    indices = {id: keys for id, (keys, _) in zip(tokens.ids, results, strict=True)}
    total = sum(len(contrast.keys) for _, contrast in results)
    keys = KeyTokens(indices, rows.length, total, evaluator_name(scorer.model), criterion, rows.start)
    return keys, [contrast.long for _, contrast in results]


def whole_nll(scorer: TokenScorer, row: torch.Tensor, id: str) -> np.ndarray:
    """Return the NLL of tokens 1, 2, ... of a row given all earlier tokens, float64, in nats."""
    nll = scorer.token_nll(row[None])[0].double().numpy()
    require_finite(nll, id, culprit=scorer.culprit)
    return nll


def check_reads(model: nn.Module, rows: Sequence[torch.Tensor]) -> None:
    """Refuse tokens outside the model's vocabulary, and positions past the end of its position table."""
    remedy = "Pass each model's own tokenizer, the evaluator's as evaluator_tokenizer="
    check_vocabulary(TokenScorer(model).model, rows, evaluator_name(model), remedy)
    patch = find_patch(model)
    check_positions(detect_scheme(model), None if patch is None else patch.plan, max(len(row) for row in rows))


def evaluator_name(model: nn.Module) -> str:
    """Return the name of an evaluator for results, including its patch if it has one."""
    patch, name = find_patch(model), model_name(TokenScorer(model).model)
    return name if patch is None else f"{name}, {patch.plan.method} x{patch.plan.factor:g}"


@dataclass(frozen=True)
class LongPPL:
    """LongPPL: perplexity of the key tokens of all documents, with equal weight for each token.

    Args:
        value (`float`): `exp(nll_sum / key_tokens)`.
        ci95 (`list[float]`, *optional*): 95 % bootstrap interval over the documents with key tokens. `None` if there
            are fewer than two.
        nll_sum (`float`): NLL of the key tokens, in nats.
        key_tokens (`int`): number of key tokens.
        perplexity (`float`): perplexity of all tokens except for the first of each document, for comparison.
        tokens (`int`): number of tokens in `perplexity`.
        per_document (`list[dict]`): `document`, `nll_sum`, `key_tokens`, `longppl` (`None` without key tokens),
            `tokens` and `all_nll_sum`.
        left_out (`list[dict]`): `document` and `tokens` of the documents that are too short.
        keys ([`KeyTokens`]): the key tokens, with their evaluator and criterion.
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

    LongPPL values are comparable only over the same key tokens. Without an evaluator, the model in its current state
    finds its own key tokens. The result describes how one model uses its context. It is unsuitable for comparing
    methods, because a method that reads worse then counts fewer tokens. To compare methods, choose one of these:

    - Pass another `evaluator` that reads `length` well.
    - Find the key tokens once with [`find_key_tokens`] while one method is in force, and pass them as `keys` each
      time. This favours that method, because `beta` keeps the tokens that it predicts well. Report which method it was
      (`keys.evaluator`).

    Args:
        model (`PreTrainedModel`): a causal language model, patched or not.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        documents (`list[Document]`, or what [`load_documents`] takes): the texts.
        length (`int`): tokens per document, including BOS if the tokenizer adds one.
        start (`int`, *optional*, defaults to 0): tokens to skip at the beginning of each document (front matter).
        evaluator (`PreTrainedModel`, *optional*): model that finds the key tokens. Defaults to `model`.
        keys ([`KeyTokens`], *optional*): key tokens found earlier with the same tokenizer, documents, length, and
            start, instead of an evaluator and the arguments below.
        evaluator_tokenizer, alpha, beta, short_length, stride: see [`find_key_tokens`].
        seed (`int`, *optional*, defaults to 0): seed of the bootstrap.

    Returns:
        [`LongPPL`]: the perplexity of the key tokens, with its interval and values per document.

    Raises:
        EvaluationError: there are no key tokens, or the logits are not finite.
        InvalidParameterError: `keys` has another length, another start, or other documents, or is passed together with
            `evaluator`. Or `evaluator_tokenizer` is passed without `evaluator`. See also [`find_key_tokens`].
        DocumentError, UnsupportedModelError: see [`evaluate_perplexity`].
    """
    if keys is not None and evaluator is not None:
        raise InvalidParameterError(
            "Expected keys or evaluator, which both say what tokens count, got both. Pass one of them."
        )
    if evaluator is None and evaluator_tokenizer is not None:
        raise InvalidParameterError(
            "Expected evaluator_tokenizer with an evaluator, got it alone. Pass evaluator=, too, or neither."
        )
    texts = as_documents(documents)
    rows = tokenize_documents(texts, tokenizer, length, start)
    if keys is None:
        tokens = read_by(evaluator_tokenizer, tokenizer, texts, rows)
        keys, nll = _find(evaluator or model, tokens, rows, Criterion(alpha, beta, short_length, stride))
        if evaluator is None:
            return _pool(rows, nll, keys, seed)
    missing = [id for id in rows.ids if id not in keys.indices]
    if (keys.length, keys.start) != (length, start) or missing:
        raise InvalidParameterError(
            f"Expected keys of length {length} from token {start} on, of all documents, got length {keys.length} from "
            f"token {keys.start} on, without the documents {missing}. Find them for the same documents, length and "
            "start."
        )
    check_reads(model, list(rows.tokens))
    scorer = TokenScorer(model)
    with evaluation_mode(scorer.model):
        progress = tqdm(zip(rows.tokens, rows.ids, strict=True), total=len(rows.ids), unit="doc", disable=None)
        nll = [whole_nll(scorer, row, id) for row, id in progress]
    return _pool(rows, nll, keys, seed)


@checked
def longce_weights(long_nll: torch.Tensor, short_nll: torch.Tensor, *, cap: float = 5.0) -> torch.Tensor:
    """Return LongCE's soft weight of each token's loss: `min(P(t | long) / P(t | short), cap)`.

    Args:
        long_nll (`torch.Tensor`): NLL of each token given the long context, in nats. These are the losses of the
            training step.
        short_nll (`torch.Tensor` of the same shape): NLL of each token given the short context, in nats. For a token
            without a shorter context, pass the value of `long_nll`, which results in a weight of 1.
        cap (`float`, *optional*, defaults to 5.0): largest weight, the paper's gamma.

    Returns:
        `torch.Tensor` of the same shape: the weights, detached, so that no gradient flows through them. The loss is
        `(weights * long_nll).mean()`.

    Raises:
        InvalidParameterError: the shapes differ, or `cap` is not positive and finite.
    """
    if long_nll.shape != short_nll.shape:
        raise InvalidParameterError(
            f"Expected long_nll and short_nll of one shape, got {tuple(long_nll.shape)} and {tuple(short_nll.shape)}. "
            "Pass the same tokens."
        )
    if not (cap > 0 and math.isfinite(cap)):
        raise InvalidParameterError(f"Expected cap to be positive and finite, got {cap}. Pass cap=5.0.")
    return (short_nll.detach() - long_nll.detach()).exp().clamp(max=cap)


def _pool(rows: TokenizedDocuments, nll: list[np.ndarray], keys: KeyTokens, seed: int) -> LongPPL:
    per_document: list[dict[str, Any]] = []
    for id, values in zip(rows.ids, nll, strict=True):
        total, count = key_sums(values, keys.indices[id]).values()
        of_keys = {
            "nll_sum": total,
            "key_tokens": count,
            "longppl": float(pooled_perplexity([total], [count])) if count else None,
        }
        per_document.append({"document": id, **of_keys, "tokens": len(values), "all_nll_sum": math.fsum(values)})
    sums, counts = columns_of(per_document, "nll_sum", "key_tokens")
    all_sums, all_counts = columns_of(per_document, "all_nll_sum", "tokens")
    if not counts:
        raise EvaluationError(
            f"Expected key tokens, got none of {sum(all_counts)} tokens ({keys.found} of the evaluator's own are "
            f"key): at alpha {keys.criterion.alpha:g} and beta {keys.criterion.beta:g}, more than "
            f"{keys.criterion.short_length} tokens of context do not help {keys.evaluator}. Pass an evaluator that "
            "reads longer, or a smaller short_length."
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


WHOLE = ("prefix", "sliding", "rolling")
"""Protocols that score every token given all earlier tokens at the longest length."""


@dataclass(frozen=True)
class KeySearch:
    """Search for key tokens by one evaluator. `enter` returns the context in which its patch is in force."""

    setup: Setup
    evaluator: str
    scorer: TokenScorer
    tokens: TokensRead
    criterion: Criterion
    enter: Callable[[], AbstractContextManager[Any]]

    @property
    def _facts(self) -> dict[str, Any]:
        return {"evaluator": self.evaluator, **self.criterion._asdict()}

    @property
    def identity(self) -> dict[str, Any]:
        """Facts about the search that a run depends on, in addition to the evaluator's weights."""
        fingerprint = hashlib.sha256(repr([row.tolist() for row in self.tokens.rows]).encode()).hexdigest()
        return {"longppl": {**self._facts, "tokens": fingerprint}}

    def run(
        self, accelerator: Accelerator | None, journal: RunJournal | None
    ) -> tuple[dict[str, list[int]], dict[str, Any]]:
        """Find the key tokens on all processes.

        Returns:
            Their indices in the row of each document that the evaluator could read, and the entry of the provenance.

        Raises:
            EvaluationError: the evaluator failed on every document.
        """
        tasks = [self._task(id, row) for id, row in zip(self.tokens.ids, self.tokens.rows, strict=True)]
        stage = Stage(f"key tokens by {self.evaluator}", self.enter, tasks, self._find)
        outcomes = measure([stage], accelerator=accelerator, journal=journal)
        failures = {str(task.document): reason for task in tasks if (reason := outcomes[task].failure) is not None}
        if len(failures) == len(tasks):
            raise EvaluationError(
                f"Expected key tokens of {self.evaluator}, got a failure on every document: "
                f"{next(iter(failures.values()))}. Pass another evaluator, as in --longppl org/name, or leave longppl "
                "out."
            )
        values = {str(task.document): outcomes[task].value for task in tasks if str(task.document) not in failures}
        if not any(value["found"] for value in values.values()):
            logger.warning(
                "no token is key, so there is no LongPPL: more than %d tokens of context do not help %s; use an "
                "evaluator that reads longer, or a smaller short_length",
                self.criterion.short_length,
                self.evaluator,
            )
        left_out = [{"document": id, "reason": reason} for id, reason in failures.items()]
        return {id: value["indices"] for id, value in values.items()}, {**self._facts, "left_out": left_out}

    def _find(self, task: Task) -> dict[str, Any]:
        index = self.tokens.ids.index(str(task.document))
        indices, contrast = find_in_row(self.scorer, self.tokens, index, self.criterion)
        return {"indices": indices, "found": len(contrast.keys)}

    def _task(self, id: str, row: torch.Tensor) -> Task:
        size = self.criterion.short_length + self.criterion.stride
        windows = 1 + max(0, len(row) - size) // self.criterion.stride
        reads = [len(row), *[min(size, len(row))] * windows]
        return task_of("keys", self.evaluator, 1.0, self.setup.lengths[-1:], reads, document=id)


def check_key_search(request: Request, trained_length: int | None, labels: Sequence[str]) -> Criterion | None:
    """Return the checked criterion of key tokens; `None` without LongPPL. This needs no documents.

    Raises:
        InvalidParameterError: no method has the label, several methods have it (pass `"yarn x8"`), the protocol does
            not score every token, or the criterion is impossible.
    """
    config = request.config
    thresholds = {"alpha": config.alpha, "beta": config.beta, "short_length": config.short_length}
    if config.longppl is None:
        for name, value in thresholds.items():
            if value is not None:
                raise InvalidParameterError(f"Expected longppl= with {name}={value}, got none. Pass longppl=, too.")
        return None
    # The model of a label reads with the tokenizer of the documents.
    if isinstance(config.longppl, tuple) and (len(config.longppl) != 2 or isinstance(config.longppl[0], str)):
        raise InvalidParameterError(
            f"Expected longppl to be a label, a model, or (model, tokenizer), got {short(config.longppl)}. Pass "
            "longppl='yarn'."
        )
    if request.protocol.name not in WHOLE:
        raise InvalidParameterError(
            f"Expected protocol to be one of {', '.join(WHOLE)} for longppl, which needs the NLL of every token given "
            f"all tokens before it, got {request.protocol.name!r}. Pass protocol='prefix', or leave longppl out."
        )
    criterion = default_criterion(thresholds, trained_length, request.lengths[-1])
    if isinstance(config.longppl, str):
        _find_label(config.longppl, labels)
        check_criterion(criterion, request.lengths[-1])
    return criterion


def key_search(setup: Setup, criterion: Criterion | None, runs: Sequence[MethodRun]) -> KeySearch | None:
    """Return the search for key tokens; `None` without a criterion. A label refers to one of the runs.

    Raises:
        InvalidParameterError: the evaluator cannot read the documents, or the criterion is impossible.
    """
    if criterion is None:
        return None
    evaluator = setup.config.longppl
    model, tokenizer = evaluator if isinstance(evaluator, tuple) else (evaluator, None)
    tokens = read_by(tokenizer, setup.tokenizer, setup.texts, setup.documents)
    check_criterion(criterion, max(len(row) for row in tokens.rows))
    if isinstance(model, str):
        run = runs[_find_label(model, [run.name for run in runs])]
        return KeySearch(setup, run.name, run.scorer, tokens, criterion, run.enter)
    check_reads(model, tokens.rows)
    scorer = token_scorer(model, setup.memory)
    return KeySearch(setup, evaluator_name(model), scorer, tokens, criterion, lambda: evaluation_mode(scorer.model))


def _find_label(label: str, names: Sequence[str]) -> int:
    """Return the index of the method with this label or name."""
    matches = [index for index, name in enumerate(names) if label in (name, name.rsplit(" x", 1)[0])]
    if len(matches) != 1:
        raise InvalidParameterError(
            f"Expected longppl to be the label of one method ({', '.join(names)}), got {label!r}, which "
            f"{'several' if matches else 'none'} of them have. Pass one of these, or a model (on the command line its "
            "folder or Hub id, with a slash in it)."
        )
    return matches[0]
