"""What documents tell: the loss by position, where it departs, and how sharp attention is."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from ..errors import DocumentError, UnsupportedModelError
from ..evaluation.scoring.scorer import TokenScorer
from ..evaluation.texts.documents import Document, Documents
from ..evaluation.texts.files import portable
from ..evaluation.texts.tokens import TokenizedDocuments, check_vocabulary, tokenize_documents
from ..patching import patch_model
from ..patching.modes import evaluation_mode
from ..plan import ExtensionPlan
from .attention import attention_table
from .change_point import departure
from .diagnosis import Diagnosis
from .loss_curve import curve_table, require_skill, short_context_losses, token_losses

BEYOND = 1.25
"""How many times the trained length documents must have, or there is nothing to see."""


def read_documents(
    model: nn.Module,
    texts: list[Document],
    tokenized: TokenizedDocuments,
    found: Diagnosis,
    plans: Mapping[str, ExtensionPlan],
    seed: int,
    *,
    attention: bool = True,
) -> Diagnosis:
    """A diagnosis with what documents tell.

    Args:
        model (`torch.nn.Module`): causal, without a patch.
        texts (`list[Document]`): the documents.
        tokenized ([`TokenizedDocuments`]): what [`long_rows`] made of them.
        found ([`Diagnosis`]): without them.
        plans (`Mapping[str, ExtensionPlan]`): to measure too, by name.
        seed (`int`): of bootstrap intervals.
        attention (`bool`, *optional*, defaults to `True`): whether attention is watched, too, in a pass of its own.
    """
    try:
        scorer = TokenScorer(model)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"{error}; or leave the documents out: what the weights tell of its positions needs none"
        ) from error
    check_vocabulary(scorer.model, tokenized.tokens)
    context = _context(found.trained_length, tokenized.length)
    own = _within_table(tokenized, found)
    with (
        evaluation_mode(scorer.model),
        tqdm(total=2 + len(plans), desc="reading", unit="pass", disable=None) as progress,
    ):
        level = short_context_losses(scorer, tokenized, context)
        require_skill(level, scorer.model.get_input_embeddings().num_embeddings, found.model)
        progress.update()
        losses = token_losses(scorer, own)
        progress.update()
        curves = [("none", losses), (f"last {context} tokens", level)]
        for name, plan in plans.items():
            with patch_model(model, plan):
                curves.append((name, token_losses(TokenScorer(model), tokenized)))
            progress.update()
    place = departure(losses - level[:, : losses.shape[1]], seed)
    tables = {**found.tables, "losses": curve_table(curves, seed)}
    notes = found.notes
    try:
        if attention:
            tables["attention"] = attention_table(scorer.model, own, scorer.model.device)
    except UnsupportedModelError as error:
        notes = (*notes, str(error))
    source = texts.source if isinstance(texts, Documents) else {}
    read = {
        "documents": tokenized.ids,
        "left_out": tokenized.left_out,
        "dataset": source.get("dataset") and portable(source["dataset"]),
        "start": tokenized.start,
        "read": own.length,
        "context": context,
        "seed": seed,
        "dtype": str(scorer.model.dtype).removeprefix("torch."),
    }
    return dataclasses.replace(
        found,
        departure=None if place is None else place.token,
        departure_interval=None if place is None else place.interval,
        rise=None if place is None else place.rise,
        tables=tables,
        notes=notes,
        provenance={**found.provenance, **read},
    )


def long_rows(
    texts: list[Document], tokenizer: Any, found: Diagnosis, start: int, *, exactly: bool
) -> TokenizedDocuments:
    """Rows of the target length, past the trained one.

    Args:
        texts (`list[Document]`): the documents.
        tokenizer (`PreTrainedTokenizerBase`): the model's.
        found ([`Diagnosis`]): without them.
        start (`int`): tokens to leave out at the beginning of each document.
        exactly (`bool`): whether the target was asked for; else rows are no longer than half of the documents are.

    Raises:
        DocumentError: no document is as long, or as long as there is something to see.
    """
    length, least = found.target_length, math.ceil(BEYOND * (found.trained_length or 0))
    if not exactly:
        counts = sorted(tokenize_documents(texts, tokenizer, 2, start).counts, reverse=True)
        length = min(length, counts[(len(counts) - 1) // 2] - start)
    if length < least:
        raise DocumentError(
            f"the documents would be read up to token {length}, and the model was trained on {found.trained_length}: "
            f"nothing past that would be seen; give documents of {least} tokens and more (four times the trained "
            "length is best), or trained_length= if the model was trained on less"
        )
    return tokenize_documents(texts, tokenizer, length, start)


def _context(trained_length: int | None, length: int) -> int:
    """Tokens of the short context, even: a quarter of the trained length, or a sixteenth of what is read."""
    wanted = trained_length // 4 if trained_length else length // 16
    return max(2, min(wanted, length // 2) // 2 * 2)


def _within_table(tokenized: TokenizedDocuments, found: Diagnosis) -> TokenizedDocuments:
    """What the model can read as it is: a learned table has an end."""
    table = found.scheme.table
    if table is None or tokenized.length <= table.usable:
        return tokenized
    return dataclasses.replace(tokenized, tokens=tokenized.tokens[:, : table.usable])
