"""Readings of documents: the loss by position, the token where it departs from its level, and entropy of attention."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import DocumentError, EvaluationError, UnsupportedModelError
from ..evaluation.documents import Document, Documents
from ..evaluation.reading import portable
from ..evaluation.scorer import TokenScorer, require_finite
from ..evaluation.tokens import TokenizedDocuments, check_vocabulary, first_scored, tokenize_documents
from ..evaluation.windows import CONTROL, TruncatedReader, Window
from ..patching import patch_model
from ..patching.modes import evaluation_mode
from ..patching.observe import last_query_scores
from ..plan import ExtensionPlan
from .weights import last_stretch

if TYPE_CHECKING:
    from .diagnosis import Diagnosis

BEYOND = 1.25
"""Shortest documents that are read, as a multiple of the trained length; shorter ones show nothing past it."""

STRETCHES = 32
"""Lines of a curve: at 2,048 tokens one is the mean of 64 tokens of each document."""

RESAMPLES = 1_999
CHANCE = 0.99
"""Share of the loss of a uniform guess from which on a model counts as untrained."""

LAYERS = 4
QUERIES = 64
ATTENTION_DOCUMENTS = 2
"""Documents whose attention is watched: enough to see a trend."""

MASKED = -6e4
"""Scores at or below are masked. Masks add the least number of a dtype, -65504 in float16."""


TOLERANCE = 0.1
"""Smallest rise that counts as a departure, in nats per token: 10 % of perplexity."""

BLOCK = 64
"""Tokens of a document whose mean is one observation. Neighbouring tokens are not independent. Blocks of this length
nearly are, after the loss of the same tokens in a short context is subtracted."""

SIGMAS = 4.0
"""Standard errors by which the rise must differ from zero. The rise is tested where it looks largest, among some
thirty independent places of a usual text, so three would give false alarms."""

ONSET = 0.25
"""Largest rise that marks the place of a departure, in nats. Half-way up is the place of a steep rise; half-way up a
slow one would be late."""

FEWEST = 4
"""Fewest blocks whose variance is estimated."""

DEPARTURE_RESAMPLES = 999


@dataclasses.dataclass(frozen=True)
class Departure:
    """Departure of the loss from its level.

    Args:
        token (`int`): index of the first token that is predicted worse.
        interval (`tuple[int, int]`, *optional*): 95 % interval over documents; `None` with one document.
        rise (`float`): mean rise over the level from there to the end, in nats per token.
    """

    token: int
    interval: tuple[int, int] | None
    rise: float


def read_documents(
    model: nn.Module,
    texts: list[Document],
    tokenized: TokenizedDocuments,
    diagnosis: Diagnosis,
    plans: Mapping[str, ExtensionPlan],
    seed: int,
    *,
    attention: bool = True,
    control: bool = False,
) -> Diagnosis:
    """Return a diagnosis completed by the losses and the attention on documents.

    Args:
        model (`torch.nn.Module`): causal, without a patch.
        texts (`list[Document]`): the documents.
        tokenized ([`TokenizedDocuments`]): the same documents, by [`long_rows`].
        diagnosis ([`Diagnosis`]): the diagnosis from the weights.
        plans (`Mapping[str, ExtensionPlan]`): plans to measure beside the model as it is, by name.
        seed (`int`): seed of the bootstrap intervals.
        attention (`bool`, *optional*, defaults to `True`): whether to watch attention, in a pass of its own.
        control (`bool`, *optional*, defaults to `False`): whether to measure the curve "truncated", the unpatched
            model with its context truncated to the trained length.
    """
    try:
        scorer = TokenScorer(model)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"{error} Or leave the documents out: a diagnosis of the weights needs none."
        ) from error
    check_vocabulary(scorer.model, tokenized.tokens)
    context = _context(diagnosis.trained_length, tokenized.length)
    readable = _within_table(tokenized, diagnosis)
    with (
        evaluation_mode(scorer.model),
        tqdm(total=2 + len(plans), desc="reading", unit="pass", disable=None) as progress,
    ):
        level = short_context_losses(scorer, tokenized, context)
        first = first_scored(tokenized.bos)
        require_skill(level[:, first - 1 :], scorer.model.get_input_embeddings().num_embeddings, diagnosis.model)
        progress.update()
        losses = token_losses(scorer, readable)
        progress.update()
        curves = [("none", losses), (f"last {context} tokens", level)]
        if control and diagnosis.trained_length:
            curves.append((CONTROL, truncated_losses(scorer, tokenized, diagnosis.trained_length)))
        for name, plan in plans.items():
            with patch_model(model, plan):
                curves.append((name, token_losses(TokenScorer(model), tokenized)))
            progress.update()
    excess = losses - level[:, : losses.shape[1]]
    place = departure(excess, seed)
    tables = {**diagnosis.tables, "losses": curve_table(curves, seed, first)}
    notes = diagnosis.notes
    try:
        if attention:
            tables["attention"] = attention_table(scorer.model, readable, scorer.model.device)
    except UnsupportedModelError as error:
        notes = (*notes, str(error))
    source = texts.source if isinstance(texts, Documents) else {}
    read = {
        "documents": tokenized.ids,
        "left_out": tokenized.left_out,
        "dataset": source.get("dataset") and portable(source["dataset"]),
        "start": tokenized.start,
        "read": readable.length,
        "kept": readable.length if place is not None else level_kept(excess, diagnosis.trained_length),
        "context": context,
        "seed": seed,
        "dtype": str(scorer.model.dtype).removeprefix("torch."),
    }
    return dataclasses.replace(
        diagnosis,
        departure=None if place is None else place.token,
        departure_interval=None if place is None else place.interval,
        rise=None if place is None else place.rise,
        tables=tables,
        notes=notes,
        provenance={**diagnosis.provenance, **read},
    )


def long_rows(
    texts: list[Document], tokenizer: PreTrainedTokenizerBase, diagnosis: Diagnosis, start: int, *, exactly: bool
) -> TokenizedDocuments:
    """Return rows of the target length, past the trained one.

    Without `exactly`, rows are at most as long as half of the documents are. A document must be 1.25 times as long as
    the trained length.
    """
    length, least = diagnosis.target_length, math.ceil(BEYOND * (diagnosis.trained_length or 0))
    if not exactly:
        counts = sorted(tokenize_documents(texts, tokenizer, 2, start).counts, reverse=True)
        length = min(length, counts[(len(counts) - 1) // 2] - start)
    if length < least:
        raise DocumentError(
            f"Expected documents of at least {least} tokens for a trained length of {diagnosis.trained_length}, got "
            f"{length} tokens to read. Pass longer documents (four times the trained length is best), or "
            "trained_length= if the model was trained on less."
        )
    return tokenize_documents(texts, tokenizer, length, start)


def _context(trained_length: int | None, length: int) -> int:
    """Return the short context, an even number: a quarter of the trained length, or a sixteenth of what is read."""
    tokens = trained_length // 4 if trained_length else length // 16
    return max(2, min(tokens, length // 2) // 2 * 2)


def _within_table(tokenized: TokenizedDocuments, diagnosis: Diagnosis) -> TokenizedDocuments:
    """Cut rows to what the unpatched model can read: a learned table has an end."""
    table = diagnosis.scheme.table
    if table is None or tokenized.length <= table.usable:
        return tokenized
    return dataclasses.replace(tokenized, tokens=tokenized.tokens[:, : table.usable])


def token_losses(scorer: TokenScorer, documents: TokenizedDocuments) -> np.ndarray:
    """Return the loss of tokens 1, 2, ... given all tokens before: nats, float64, `(documents, length - 1)`."""
    rows = []
    for name, tokens in zip(documents.ids, documents.tokens, strict=True):
        nll = scorer.token_nll(tokens[None])[0].double().numpy()
        require_finite(nll, name, culprit=scorer.culprit)
        rows.append(nll)
    return np.stack(rows)


def short_context_losses(scorer: TokenScorer, documents: TokenizedDocuments, context: int) -> np.ndarray:
    """Return the loss of the same tokens, each given at most the last `context` tokens.

    This is the level that positions cannot spoil. Windows of `context` tokens move by half of that. The first window
    is scored whole and the second half of each other one, so that every token has at least half of the context. Each
    window begins with the special tokens of the document.

    The number of tokens, `context`, is even and less than that of a row.
    """
    step, length = context // 2, documents.length
    begins = list(range(step, length - context, step)) + [length - context]
    rows = []
    for name, tokens in zip(documents.ids, documents.tokens, strict=True):
        windows = torch.stack([tokens[begin : begin + context] for begin in begins])
        windows[:, : documents.bos] = tokens[: documents.bos]
        nll = np.empty(length - 1)
        nll[: context - 1] = scorer.token_nll(tokens[None, :context])[0].numpy()
        for begin, scored in zip(begins, scorer.token_nll(windows, step).numpy(), strict=True):
            nll[begin + step - 1 : begin + context - 1] = scored
        require_finite(nll, name, culprit=scorer.culprit)
        rows.append(nll)
    return np.stack(rows)


def truncated_losses(scorer: TokenScorer, documents: TokenizedDocuments, trained_length: int) -> np.ndarray:
    """Return the loss of the same tokens, each given at most the trained length: the control of a gain."""
    window = Window(0, 1, documents.length)
    readers = [TruncatedReader(scorer, tokens, trained_length, documents.bos) for tokens in documents.tokens]
    return np.stack([reader.nll([window]) for reader in readers])


def require_skill(losses: np.ndarray, vocabulary: int, name: str) -> None:
    """Refuse a model that predicts no better than a uniform guess, on which positions would show no effect."""
    loss, guess = float(losses.mean()), math.log(vocabulary)
    if loss >= CHANCE * guess:
        raise EvaluationError(
            f"{name} has a loss of {loss:.2f} nats per token in a short context, no better than a guess among its "
            f"{vocabulary} tokens ({guess:.2f}), so nothing can be seen of its positions. Check that its weights are "
            "trained, that the tokenizer is its own, and that the documents are in a language that it knows."
        )


def curve_table(curves: Sequence[tuple[str, np.ndarray]], seed: int = 0, first: int = 1) -> pd.DataFrame:
    """Return mean losses of stretches of the text, a line for each curve and stretch.

    Columns: `curve`, `begin` and `end` (tokens, the end not included), `nll` (nats per token), `low` and `high`
    (95 %, percentile bootstrap over documents; NaN with one document). Losses have the shape `(documents, length -
    1)`. `first` is the first token that counts, behind special tokens.
    """
    longest = max(losses.shape[1] for _, losses in curves) + 1
    bounds = np.unique(np.maximum(np.arange(STRETCHES + 1) * longest // STRETCHES, first))
    lines: list[dict[str, Any]] = []
    for name, losses in curves:
        ends = bounds[bounds <= losses.shape[1] + 1]
        means = np.stack([losses[:, a - 1 : b - 1].mean(1) for a, b in zip(ends[:-1], ends[1:], strict=True)])
        low, high = _interval(means, seed)
        for line in zip(ends[:-1], ends[1:], means.mean(1), low, high, strict=True):
            lines.append({"curve": name, **dict(zip(("begin", "end", "nll", "low", "high"), line, strict=True))})
    return pd.DataFrame(lines)


def _interval(means: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return 95 % intervals of the mean of each line of `(lines, documents)`, by the same draws in each."""
    if means.shape[1] < 2:
        return np.full(len(means), math.nan), np.full(len(means), math.nan)
    from scipy.stats import bootstrap

    interval = bootstrap(
        (means,), np.mean, axis=-1, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(seed)
    ).confidence_interval
    return interval.low, interval.high


def attention_table(model: PreTrainedModel, documents: TokenizedDocuments, device: torch.device) -> pd.DataFrame:
    """Return entropy and spread of attention at some sixty positions, in up to four layers.

    Columns: `position`, `layer`, `entropy` (nats; `exp` of it is the number of tokens that a head looks at), `spread`
    (standard deviation of the scores over visible keys, biases of the model included). Means over heads and documents.
    """
    chunk = max(2, documents.length // QUERIES)
    lines = []
    for tokens in documents.tokens[:ATTENTION_DOCUMENTS]:
        for position, layers in last_query_scores(model, tokens.to(device), chunk):
            for layer in sample(len(layers)):
                entropy, spread = sharpness(layers[layer])
                lines.append({"position": position, "layer": layer, "entropy": entropy, "spread": spread})
    return pd.DataFrame(lines).groupby(["layer", "position"], as_index=False).mean()


def sample(count: int) -> list[int]:
    """Return up to four layers, evenly spaced, the first and last among them."""
    return sorted({round(step * (count - 1) / (LAYERS - 1)) for step in range(LAYERS)})


def sharpness(scores: torch.Tensor) -> tuple[float, float]:
    """Return the entropy of the weights and the standard deviation of the visible scores, means over heads.

    `scores` are the inputs of the softmax, float32 of shape `(heads, keys)`.
    """
    visible = scores > MASKED
    logs = scores.masked_fill(~visible, -torch.inf).log_softmax(-1)
    entropy = -(logs.exp() * logs.masked_fill(~visible, 0)).sum(-1)
    count = visible.sum(-1).clamp(min=1)
    mean = (scores.masked_fill(~visible, 0)).sum(-1) / count
    variance = ((scores - mean[:, None]).masked_fill(~visible, 0) ** 2).sum(-1) / count
    return float(entropy.mean()), float(variance.sqrt().mean())


def departure(excess: np.ndarray, seed: int = 0) -> Departure | None:
    """Return the place from which on the loss stays above its level, `None` if it does not.

    `excess` is the loss of each token, from token 1 on, less its level: nats, `(documents, tokens)`. It is at most
    zero if nothing is wrong. The interval is a percentile bootstrap over documents.
    """
    # A candidate: the final stretch that exceeds half of the tolerance by the largest sum.
    place = last_stretch(excess.mean(0) - TOLERANCE / 2)
    if place is None:
        return None
    # The test: its mean reaches the tolerance, and four standard errors over blocks.
    tail = excess[:, place:]
    blocks = _block_means(tail)
    rise = float(tail.mean())
    if len(blocks) < FEWEST or rise < max(TOLERANCE, SIGMAS * blocks.std(ddof=1) / math.sqrt(len(blocks))):
        return None
    # The place: the same statistic at half of that rise, or a quarter of a nat if that is less.
    onset = min(rise / 2, ONSET)
    place = last_stretch(excess.mean(0) - onset)
    assert place is not None  # from the first place on, the mean is the rise: at least twice the onset
    return Departure(place + 1, _departure_interval(excess, onset, seed), float(excess[:, place:].mean()))


def level_kept(excess: np.ndarray, trained_length: int | None) -> int:
    """Return the number of tokens in which the loss is known to keep its level, if there is no [`departure`].

    They are all tokens that were read, unless fewer than four blocks lie past the trained length, or the loss ends in
    a rise that stands out against the blocks before it, although its own blocks do not show a departure.
    """
    documents, read = len(excess), int(excess.shape[1]) + 1
    if trained_length and trained_length < read and documents * (read - trained_length) < FEWEST * BLOCK:
        return trained_length
    place = last_stretch(excess.mean(0) - TOLERANCE / 2)
    if place is None or len(before := _block_means(excess[:, :place])) < FEWEST:
        return read
    tail = excess[:, place:]
    rise, error = float(tail.mean()), before.std(ddof=1) * math.sqrt(BLOCK / tail.size)
    if rise < max(TOLERANCE, SIGMAS * error):
        return read
    return 1 + int(last_stretch(excess.mean(0) - min(rise / 2, ONSET)) or 0)


def _block_means(tail: np.ndarray) -> np.ndarray:
    """Return means of whole blocks of each document, counted from the end, as one row."""
    documents, tokens = tail.shape
    covered = tokens - tokens % BLOCK
    return np.asarray(tail[:, tokens - covered :].reshape(documents, -1, BLOCK).mean(-1).ravel())


def _departure_interval(excess: np.ndarray, onset: float, seed: int) -> tuple[int, int] | None:
    """Return the interval over resampled documents. Samples without a departure are left out."""
    documents = len(excess)
    if documents < 2:
        return None
    weights = np.random.default_rng(seed).multinomial(documents, [1 / documents] * documents, size=DEPARTURE_RESAMPLES)
    places = [last_stretch(mean - onset) for mean in weights / documents @ excess]
    low, high = np.percentile([place + 1 for place in places if place is not None], [2.5, 97.5])
    return round(low), round(high)
