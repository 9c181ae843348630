"""What every measurement does first: check what was asked for, and say what it was."""

from __future__ import annotations

import datetime
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ...packages import versions_of
from ...scheme import PositionalScheme
from ..protocols.choice import choose_protocol
from ..protocols.protocol import PerplexityProtocol
from ..results.rows import Conditions
from ..scoring.distribution import process_facts
from ..scoring.scorer import Memory, autocast_dtype, model_name
from ..texts.documents import Document, Documents, as_documents
from ..texts.files import portable
from ..texts.tokens import TokenizedDocuments, check_lengths, check_vocabulary, tokenize_documents

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Options:
    """
    How documents are read; all as in [`evaluate_perplexity`].

    Args:
        protocol (`str`, *optional*): name.
        stride (`int`, *optional*): of windows that overlap, in tokens.
        tail (`int`, *optional*): tokens that protocol `"tail"` counts.
        start (`int`, *optional*, defaults to 0): tokens to leave out at the beginning of each document.
        memory ([`Memory`], *optional*): how the trunk is read.
        seed (`int`, *optional*, defaults to 0): of the bootstrap and of the pass keys.
        accelerator (`Accelerator`, *optional*): of the processes that share the work.
    """

    protocol: str | None = None
    stride: int | None = None
    tail: int | None = None
    start: int = 0
    memory: Memory = Memory()
    seed: int = 0
    accelerator: Accelerator | None = None


@dataclass(frozen=True)
class Setup:
    """A model and documents, checked and ready to be measured.

    Args:
        scorer (`Any`): of the model, as the protocol needs it.
        tokenizer (`PreTrainedTokenizerBase`): the model's.
        texts (`Sequence[Document]`): the documents as they were given, or loaded.
        documents ([`TokenizedDocuments`]): rows of `max(lengths)` tokens, as the protocol arranges them.
        lengths (`list[int]`): ascending, in tokens.
        protocol ([`PerplexityProtocol`]): how to measure.
        options ([`Options`]): what was asked for.
        conditions ([`Conditions`]): what every row says.
        provenance (`dict`): what is needed to measure the same again.
    """

    scorer: Any
    tokenizer: Any
    texts: Sequence[Document]
    documents: TokenizedDocuments
    lengths: list[int]
    protocol: PerplexityProtocol
    options: Options
    conditions: Conditions
    provenance: dict[str, Any]

    def scorer_of(self, model: nn.Module) -> Any:
        """What scores the same tokens with another model.

        Raises:
            InvalidParameterError: its vocabulary is smaller than the tokenizer's.
            UnsupportedModelError: the protocol means nothing for it.
        """
        scorer = self.protocol.scorer(model, self.tokenizer, self.options.memory)
        check_vocabulary(scorer.model, self.documents.tokens)
        return scorer


def prepare(
    model: nn.Module,
    tokenizer: Any,
    documents: Any,
    lengths: Sequence[int],
    scheme: PositionalScheme,
    options: Options,
) -> Setup:
    """Check all that was asked for before anything long begins; arguments as in [`evaluate_perplexity`]."""
    ascending = check_lengths(lengths)
    protocol = choose_protocol(options.protocol, model, ascending, stride=options.stride, tail=options.tail)
    scorer = protocol.scorer(model, tokenizer, options.memory)
    texts = as_documents(documents)
    tokenized = tokenize_documents(texts, tokenizer, ascending[-1], options.start)
    check_vocabulary(scorer.model, tokenized.tokens)
    arranged = protocol.arrange(tokenized)
    dtype, autocast = str(scorer.model.dtype).removeprefix("torch."), autocast_dtype(scorer.model)
    conditions = Conditions.of(protocol, tokenized, dtype if autocast is None else f"{dtype}, autocast to {autocast}")
    source = texts.source if isinstance(texts, Documents) else {"dataset": None, "split": None, "revision": None}
    provenance = {
        "versions": _versions(),
        "model": model_name(scorer.model),
        "model_type": scheme.model_type,
        "kind": scheme.kind,
        "generalization": scheme.generalization,
        "dtype": conditions.dtype,
        "device": str(scorer.model.device),
        **process_facts(options.accelerator, str(scorer.model.device)),
        **source,
        "dataset": source["dataset"] and portable(source["dataset"]),
        "seed": options.seed,
        "start": options.start,
        "protocol": protocol.name,
        "legacy": protocol.legacy,
        "stride": options.stride,
        "tail": options.tail,
        "prefill_chunk": options.memory.prefill_chunk,
        "offload_cache": options.memory.offload_cache,
        "lengths": ascending,
        "bos": conditions.bos,
        "trained_length": scheme.trained_length,
        "shipped_length": scheme.shipped_length,
        "documents": [
            {"document": id, "tokens": count} for id, count in zip(tokenized.ids, tokenized.counts, strict=True)
        ],
        "left_out": tokenized.left_out,
        "command": shlex.join([Path(sys.argv[0]).name, *map(portable, sys.argv[1:])]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    return Setup(scorer, tokenizer, texts, arranged, ascending, protocol, options, conditions, provenance)


def _versions() -> dict[str, str]:
    return {**versions_of("hf_posext", "transformers", "torch"), "python": platform.python_version()}
