"""Perplexity of encoder-decoders: teacher-forced tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from ...errors import InvalidParameterError
from ..scoring.progress import tokens_read
from ..scoring.scorer import WHOLE, Memory, require_finite
from ..texts.tokens import TokenizedDocuments
from .protocol import Measurement
from .special_tokens import FramedScorer, OfFramedTexts, plain_text, require_room

TARGETS = 128
"""Tokens that a decoder is asked for at most."""


class Seq2SeqScorer(FramedScorer):
    """
    Scores a text that continues another, with an encoder-decoder.

    Args:
        model (`torch.nn.Module`): with a language-model head, also inside a PEFT or DDP wrapper.
        tokenizer (`PreTrainedTokenizerBase`): the model's.

    Raises:
        InvalidParameterError: the model does not say which token its decoder starts with.
        UnsupportedModelError: a model with prompt tuning.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, memory: Memory = WHOLE) -> None:
        super().__init__(model, tokenizer, memory)
        generation = getattr(self.model, "generation_config", None)
        said = (getattr(config, "decoder_start_token_id", None) for config in (generation, self.model.config))
        start = next((token for token in said if token is not None), None)
        if start is None:
            raise InvalidParameterError(
                f"{type(self.model).__name__} does not say what its decoder starts with; set "
                "model.generation_config.decoder_start_token_id (mBART: the token of the language)"
            )
        self.start = torch.cat([torch.tensor([start], device="cpu"), self.before])

    @torch.no_grad()
    def token_nll(self, read: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """
        NLL of each target given the encoded text and the targets before it.

        Args:
            read (`torch.LongTensor` of shape `(length,)`): what the encoder reads, without special tokens.
            targets (`torch.LongTensor` of shape `(targets,)`): what the decoder is asked for.

        Returns:
            `torch.FloatTensor` of shape `(targets,)`, float32 on the CPU, in nats.
        """
        given = torch.cat([self.start, targets[:-1]])
        inputs = {"input_ids": self.around(read), "decoder_input_ids": given}
        on_device = {name: ids[None].to(self.model.device) for name, ids in inputs.items()}
        logits = self.model(**on_device, use_cache=False).logits[0, len(self.before) :].float().cpu()
        nll = F.cross_entropy(logits, targets, reduction="none")
        tokens_read(len(read) + len(given))
        self.look_at(nll[None], lambda row: self.model(**on_device, use_cache=False))
        return nll


@dataclass(frozen=True)
class Seq2Seq(OfFramedTexts):
    """
    Perplexity of the text that follows what an encoder has read.

    Of the first `L` tokens, special ones of the encoder's text included, the encoder reads the first `L - K` and the
    decoder is teacher-forced on the next `K = min(128, L // 4)`: it is given its start token, what the tokenizer puts
    before a text, and the targets before the one that is scored. All of them lie in the second half of the text, and
    so in the tail. The control has the same targets, and the encoder reads of its text the last tokens only, so many
    that they are the trained length with the special ones.
    """

    name: ClassVar[str] = "seq2seq"

    def scorer(self, model: nn.Module, tokenizer: Any, memory: Memory) -> Seq2SeqScorer:
        return Seq2SeqScorer(model, tokenizer, memory)

    def measure(
        self, scorer: Seq2SeqScorer, documents: TokenizedDocuments, index: int, lengths: list[int]
    ) -> list[Measurement]:
        return self.measure_control(scorer, documents, index, lengths, lengths[-1])

    def measure_control(
        self, scorer: Seq2SeqScorer, documents: TokenizedDocuments, index: int, lengths: list[int], trained_length: int
    ) -> list[Measurement]:
        require_room(min(lengths[0] - lengths[0] // 4, trained_length), scorer.special + 1)
        require_room(lengths[0], 4)
        row = plain_text(documents, index)
        found = []
        for length in lengths:
            count = min(TARGETS, length // 4)
            end = length - count - scorer.special
            begin = max(0, end + scorer.special - trained_length)
            nll = scorer.token_nll(row[begin:end], row[end : end + count]).double().numpy()
            require_finite(nll, documents.ids[index], range(end, end + count), scorer.culprit)
            found.append(Measurement(length, nll, first=end + documents.bos, tail=count))
        return found

    def reads(self, lengths: list[int], longest: int) -> list[int]:
        return lengths
