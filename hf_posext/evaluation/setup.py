"""What every measurement does first: check what was asked for, and say what it was."""

from __future__ import annotations

import datetime
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import InvalidParameterError
from ..plan import ExtensionPlan
from ..scheme import PositionalScheme
from .documents import Document, Documents, load_documents
from .files import portable
from .noncausal import choose_protocol
from .protocols import DECODER_PROTOCOLS, PerplexityProtocol
from .tokens import TokenizedDocuments, check_lengths, tokenize_documents


@dataclass(frozen=True)
class Setup:
    """A model and documents, checked and ready to be measured.

    Args:
        scorer (`Any`): of the model, as the protocol needs it.
        documents ([`TokenizedDocuments`]): rows of `max(lengths)` tokens.
        lengths (`list[int]`): ascending, in tokens.
        protocol ([`PerplexityProtocol`]): how to measure.
        provenance (`dict`): what is needed to measure the same again.
    """

    scorer: Any
    documents: TokenizedDocuments
    lengths: list[int]
    protocol: PerplexityProtocol
    provenance: dict[str, Any]


def prepare(
    model: nn.Module,
    tokenizer: Any,
    documents: Any,
    lengths: Sequence[int],
    scheme: PositionalScheme,
    *,
    protocol: str | None,
    stride: int | None,
    start: int,
    seed: int,
) -> Setup:
    """Check all that was asked for before anything long begins; arguments as in [`evaluate_perplexity`]."""
    ascending = check_lengths(lengths)
    chosen = choose_protocol(protocol, model, ascending, stride)
    scorer = chosen.scorer(model, tokenizer)
    texts = documents
    if not isinstance(documents, list) or not all(isinstance(document, Document) for document in documents):
        texts = load_documents(documents)
    tokenized = tokenize_documents(texts, tokenizer, ascending[-1], start)
    vocabulary = scorer.model.get_input_embeddings().num_embeddings
    if int(tokenized.tokens.max()) >= vocabulary:
        raise InvalidParameterError(
            f"the tokenizer gave token {int(tokenized.tokens.max())}, and the model has {vocabulary}; "
            "load both from the same checkpoint"
        )
    source = texts.source if isinstance(texts, Documents) else {"dataset": None, "split": None, "revision": None}
    provenance = {
        "versions": _versions(),
        "model": portable(scorer.model.config.name_or_path) or type(scorer.model).__name__,
        "model_type": scheme.model_type,
        "kind": scheme.kind,
        "generalization": scheme.generalization,
        "dtype": str(scorer.model.dtype).removeprefix("torch."),
        "device": str(scorer.model.device),
        **source,
        "dataset": source["dataset"] and portable(source["dataset"]),
        "seed": seed,
        "start": start,
        "protocol": chosen.name,
        "stride": stride,
        "lengths": ascending,
        "bos": _bos(chosen, tokenized),
        "trained_length": scheme.trained_length,
        "shipped_length": scheme.shipped_length,
        "documents": [
            {"document": id, "tokens": count} for id, count in zip(tokenized.ids, tokenized.counts, strict=True)
        ],
        "left_out": tokenized.left_out,
        "command": shlex.join([Path(sys.argv[0]).name, *map(portable, sys.argv[1:])]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    return Setup(scorer, tokenized, ascending, chosen, provenance)


def check_positions(scheme: PositionalScheme, plan: ExtensionPlan | None, longest: int) -> None:
    """
    Refuse lengths past the end of a learned table: there is nothing to read there, and a GPU would abort.

    Raises:
        InvalidParameterError: the table, as it is or extended by the plan, is shorter than `longest`.
    """
    rows = scheme.shipped_length if plan is None or plan.changes_nothing else plan.target_length
    if scheme.kind == "learned" and rows is not None and longest > rows:
        raise InvalidParameterError(
            f"{scheme.model_type} has a learned table of {rows} positions, and {longest} tokens were asked for; "
            f"give lengths up to {rows}"
        )


def _bos(protocol: PerplexityProtocol, documents: TokenizedDocuments) -> str:
    if protocol.name not in DECODER_PROTOCOLS:
        return "special tokens of the tokenizer around each text, counted"
    return "added by the tokenizer, kept" if documents.bos else "none: the tokenizer adds none"


def _versions() -> dict[str, str]:
    packages = ("hf_posext", "transformers", "torch")
    return {**{name: metadata.version(name) for name in packages}, "python": platform.python_version()}
