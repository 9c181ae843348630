"""The special tokens around a text, for models that are trained with them around every text."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...errors import InvalidParameterError
from ..scoring.boundaries import Boundaries
from ..scoring.nonfinite import Scorer
from ..scoring.scorer import WHOLE, Memory, scored_model
from ..texts.tokens import TokenizedDocuments, special_tokens


class FramedScorer(Scorer):
    """A model, and the special tokens that belong around each text.

    Raises:
        InvalidParameterError: `memory` asks for chunks; such models read a text as a whole.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, memory: Memory = WHOLE) -> None:
        self.model = scored_model(model)
        if memory.prefill_chunk is not None:
            raise InvalidParameterError(
                f"prefill_chunk is {memory.prefill_chunk}, and {type(self.model).__name__} reads a text as a whole; "
                "leave it out"
            )
        before, after = special_tokens(tokenizer)
        # on the CPU, as texts are, whatever the default device of the process is
        self.before, self.after = (torch.tensor(ids, dtype=torch.long, device="cpu") for ids in (before, after))

    @property
    def special(self) -> int:
        """Number of special tokens."""
        return len(self.before) + len(self.after)

    def around(self, text: torch.Tensor) -> torch.Tensor:
        """The tokens of a text with the special ones."""
        return torch.cat([self.before, text, self.after])


class OfFramedTexts:
    """Base of the protocols that put special tokens around each text."""

    legacy = False

    def bos_rule(self, bos: int) -> str:
        return "special tokens of the tokenizer around each text, counted"

    def arrange(self, documents: TokenizedDocuments) -> TokenizedDocuments:
        return documents

    def passes(self, lengths: list[int], boundaries: Boundaries) -> list[list[int]]:
        return [[length] for length in lengths]


def plain_text(documents: TokenizedDocuments, index: int) -> torch.Tensor:
    """A row without the BOS that it begins with: it is one of the special tokens around a text here."""
    return documents.tokens[index, int(documents.bos) :]


def require_room(length: int, needed: int) -> None:
    """Refuse a text that is too short to score."""
    if length < needed:
        raise InvalidParameterError(f"a text of {length} tokens is too short to score; give {needed} or more")
