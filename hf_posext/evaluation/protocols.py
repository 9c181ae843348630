"""All protocols by name, and those of encoders and encoder-decoders, with special tokens around every text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from ..errors import InvalidParameterError, UnsupportedModelError
from .forwards import Room, deviation, hidden_states, with_hidden_states
from .scorer import BATCH_TOKENS, WHOLE, Memory, Scorer, require_finite, scored_model, tokens_read
from .tokens import TokenizedDocuments, special_tokens
from .windows import (
    LegacyLongLoRA,
    LegacyYaRN,
    Measurement,
    PerplexityProtocol,
    Prefix,
    Rolling,
    Sliding,
    Tail,
)


class FramedScorer(Scorer):
    """Base class of scorers that put special tokens around each text, which their models read as a whole."""

    def __init__(self, model: nn.Module, tokenizer: Any, memory: Memory = WHOLE) -> None:
        self.model = scored_model(model)
        if memory.prefill_chunk is not None:
            raise InvalidParameterError(
                f"Expected prefill_chunk to be left out, as {type(self.model).__name__} reads a text as a whole, got "
                f"{memory.prefill_chunk}. Drop it."
            )
        # On the CPU like the texts, even if the default device of the process is another one.
        self.before, self.after = (
            torch.tensor(ids, dtype=torch.long, device="cpu") for ids in special_tokens(tokenizer)
        )

    @property
    def special(self) -> int:
        """Number of special tokens around a text."""
        return len(self.before) + len(self.after)

    def around(self, text: torch.Tensor) -> torch.Tensor:
        """Return the tokens of a text with the special tokens around it."""
        return torch.cat([self.before, text, self.after])


class OfFramedTexts(PerplexityProtocol):
    """Base class of the protocols that put special tokens around each text."""

    def bos_rule(self, bos: int) -> str:
        return "special tokens of the tokenizer around each text, counted"


def require_room(length: int, needed: int) -> None:
    """Refuse a text that is too short to score."""
    if length < needed:
        raise InvalidParameterError(
            f"Expected texts of {needed} tokens or more, which can be scored, got {length}. Pass lengths from "
            f"{needed} on."
        )


SAMPLES = 64
"""Number of masked tokens per document, each in a separate forward. Eight novels give 512 tokens."""


class MaskedScorer(FramedScorer):
    """Scorer of masked tokens for an encoder with a masked-LM head."""

    def __init__(self, model: nn.Module, tokenizer: Any, memory: Memory = WHOLE) -> None:
        super().__init__(model, tokenizer, memory)
        if tokenizer.mask_token_id is None:
            raise InvalidParameterError(
                f"Expected a tokenizer with a mask token, got {type(tokenizer).__name__} without one. Pass the one "
                "that belongs to the encoder."
            )
        self.mask: int = tokenizer.mask_token_id
        self._trunk: nn.Module = self.model.base_model
        self._texts = Room("texts in a batch", BATCH_TOKENS)
        self._checked = False

    @torch.no_grad()
    def token_nll(self, texts: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """Return the NLL of one masked token of each text.

        Args:
            texts (`torch.LongTensor` of shape `(texts, length)`): texts without special tokens.
            at (`torch.LongTensor` of shape `(texts,)`): index of the token to mask and score in each text.

        Returns:
            `torch.FloatTensor` of shape `(texts,)`, float32 on the CPU, in nats.
        """
        targets = texts.gather(1, at[:, None])[:, 0]
        masked = texts.scatter(1, at[:, None], self.mask)
        inputs = torch.stack([self.around(text) for text in masked]).to(self.model.device)
        at = at + len(self.before)
        if not self._checked:
            self._check(inputs[:1], at[:1])
        nll = torch.empty(len(inputs), dtype=torch.float32, device="cpu")
        for part in self._texts.parts(range(len(inputs)), cost=inputs.shape[1]):
            with part:
                logits = self._logits(inputs[part.items], at[part.items]).float().cpu()
                nll[part.items] = F.cross_entropy(logits, targets[part.items], reduction="none")
                tokens_read(inputs[part.items].numel())
        self.look_at(nll[:, None], lambda row: self._logits(inputs[row : row + 1], at[row : row + 1]))
        return nll

    def _logits(self, inputs: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """Return the logits `(rows, vocabulary)` at position `at` of each row.

        Only that position passes through the head.
        """

        def keep_one(module: nn.Module, args: Any, output: Any) -> Any:
            hidden = hidden_states(output)
            places = at.to(hidden.device)[:, None, None].expand(-1, 1, hidden.shape[-1])
            return with_hidden_states(output, hidden.gather(1, places))

        handle = self._trunk.register_forward_hook(keep_one)
        try:
            logits: torch.Tensor = self.model(input_ids=inputs).logits[:, 0]
        finally:
            handle.remove()
        return logits

    def _check(self, inputs: torch.Tensor, at: torch.Tensor) -> None:
        """Refuse a head that reads more than the token it predicts, because it would be scored wrongly."""
        full = self.model(input_ids=inputs).logits[0, at[0]]
        difference = deviation(self._logits(inputs, at)[0], full)
        if difference is not None:
            raise UnsupportedModelError(
                f"Expected a head that reads only the token that it predicts, got that of {type(self.model).__name__} "
                f"(logits differ by {difference:.2g}), which has no pseudo-perplexity. Pass another model."
            )
        self._checked = True


@dataclass(frozen=True)
class Pseudo(OfFramedTexts):
    """Pseudo-perplexity of an encoder (Salazar et al. 2020, arXiv 1910.14659): each masked token given all others.

    A text of length `L` is the first `n = L - specials` tokens of a document, with the tokenizer's special tokens
    around it. `S = min(samples, n)` of its tokens are scored: the middle token of each of `S` equal stretches (token
    `(2 j + 1) n // (2 S)` for `j` below `S`). Each token is masked alone in a separate forward, because other masked
    tokens would be missing from its context. The tail is the second half of the scored tokens. All methods score the
    same tokens.

    The control scores them in a window of the trained length `T`, special tokens included. The window has
    `w = T - specials` text tokens and begins `w // 2` tokens before the scored token. It is shifted if it would extend
    past either end of the text.

    Args:
        samples (`int`, *optional*, defaults to 64): number of scored tokens per document and length.
    """

    samples: int = SAMPLES
    name: ClassVar[str] = "pseudo"

    def scorer(self, model: nn.Module, tokenizer: Any, memory: Memory) -> MaskedScorer:
        return MaskedScorer(model, tokenizer, memory)

    def measure(
        self, scorer: MaskedScorer, documents: TokenizedDocuments, index: int, lengths: list[int],
        context: int | None = None,
    ) -> list[Measurement]:  # fmt: skip
        context = context or lengths[-1]
        require_room(min(lengths[0], context), scorer.special + 1)
        row = documents.tokens[index, documents.bos :]  # the scorer adds the prefix with the other special tokens
        measurements = []
        for length in lengths:
            count = length - scorer.special
            size = min(length, context) - scorer.special
            # The middle of each of equally long stretches.
            scored = min(self.samples, count)
            places = (2 * torch.arange(scored, device="cpu") + 1) * count // (2 * scored)
            # Windows are centred on the scored token, and shifted to stay inside the text.
            begins = (places - size // 2).clamp(0, count - size)
            texts = torch.stack([row[begin : begin + size] for begin in begins.tolist()])
            nll = scorer.token_nll(texts, places - begins).double().numpy()
            require_finite(nll, documents.ids[index], places.tolist(), scorer.culprit)
            positions = places.numpy() + documents.bos
            measurements.append(Measurement(length, nll, first=None, places=positions, tail=(scored + 1) // 2))
        return measurements

    def reads(self, lengths: list[int], longest: int) -> list[int]:
        return [length for length in lengths for _ in range(min(self.samples, length))]


TARGETS = 128
"""Maximum number of target tokens for the decoder."""


class Seq2SeqScorer(FramedScorer):
    """Scorer of a text that continues another one, for an encoder-decoder."""

    def __init__(self, model: nn.Module, tokenizer: Any, memory: Memory = WHOLE) -> None:
        super().__init__(model, tokenizer, memory)
        generation = getattr(self.model, "generation_config", None)
        starts = (getattr(config, "decoder_start_token_id", None) for config in (generation, self.model.config))
        start = next((token for token in starts if token is not None), None)
        if start is None:
            raise InvalidParameterError(
                f"Expected {type(self.model).__name__} to say what its decoder starts with, got no token. Set "
                "model.generation_config.decoder_start_token_id (mBART: the token of the language)."
            )
        self.start = torch.cat([torch.tensor([start], device="cpu"), self.before])

    @torch.no_grad()
    def token_nll(self, read: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the NLL of each target given the encoder's text and all earlier targets.

        Args:
            read (`torch.LongTensor` of shape `(length,)`): text for the encoder, without special tokens.
            targets (`torch.LongTensor` of shape `(targets,)`): tokens that continue the text.

        Returns:
            `torch.FloatTensor` of shape `(targets,)`, float32 on the CPU, in nats.
        """
        decoder_ids = torch.cat([self.start, targets[:-1]])
        inputs = {"input_ids": self.around(read), "decoder_input_ids": decoder_ids}
        on_device = {name: ids[None].to(self.model.device) for name, ids in inputs.items()}
        logits = self.model(**on_device, use_cache=False).logits[0, len(self.before) :].float().cpu()
        nll = F.cross_entropy(logits, targets, reduction="none")
        tokens_read(len(read) + len(decoder_ids))
        self.look_at(nll[None], lambda row: self.model(**on_device, use_cache=False))
        return nll


@dataclass(frozen=True)
class Seq2Seq(OfFramedTexts):
    """Perplexity of the text that follows the encoder's input.

    The `L` tokens include the special tokens of the encoder's text. The encoder reads the first `L - K` tokens, and
    the decoder is teacher-forced on the next `K = min(128, L // 4)` tokens. The input of the decoder is its start
    token, the tokenizer's special prefix, and the targets before the scored one. All targets lie in the second half of
    the text, and therefore in the tail. The control scores the same targets, but its encoder reads only the last
    tokens of the text, up to the trained length with special tokens included.
    """

    name: ClassVar[str] = "seq2seq"

    def scorer(self, model: nn.Module, tokenizer: Any, memory: Memory) -> Seq2SeqScorer:
        return Seq2SeqScorer(model, tokenizer, memory)

    def measure(
        self, scorer: Seq2SeqScorer, documents: TokenizedDocuments, index: int, lengths: list[int],
        context: int | None = None,
    ) -> list[Measurement]:  # fmt: skip
        context = context or lengths[-1]
        require_room(min(lengths[0] - lengths[0] // 4, context), scorer.special + 1)
        require_room(lengths[0], 4)
        row = documents.tokens[index, documents.bos :]  # the scorer adds the prefix with the other special tokens
        measurements = []
        for length in lengths:
            count = min(TARGETS, length // 4)
            end = length - count - scorer.special
            begin = max(0, end + scorer.special - context)
            nll = scorer.token_nll(row[begin:end], row[end : end + count]).double().numpy()
            require_finite(nll, documents.ids[index], range(end, end + count), scorer.culprit)
            measurements.append(Measurement(length, nll, first=end + documents.bos, tail=count))
        return measurements

    def reads(self, lengths: list[int], longest: int) -> list[int]:
        return lengths


PROTOCOLS: dict[str, Any] = {
    protocol.name: protocol
    for protocol in (Prefix, Sliding, Rolling, Tail, LegacyYaRN, LegacyLongLoRA, Pseudo, Seq2Seq)
}
DECODER_PROTOCOLS = ("prefix", "sliding", "rolling", "tail", "legacy-yarn", "legacy-longlora")

FITTING = {"causal": DECODER_PROTOCOLS, "masked": ("pseudo",), "seq2seq": ("seq2seq",)}
"""Protocols for each kind of language model. The first is the default."""


def protocol_for(
    name: str | None, kind: str, model: str, lengths: list[int], *, stride: int | None = None, tail: int | None = None
) -> PerplexityProtocol:
    """Return the requested protocol, or the default for the kind of model (see [`model_kind`]).

    Raises:
        InvalidParameterError: an unknown protocol, one that does not fit the model, an option that the protocol does
            not have, or a required option that is missing or out of range.
    """
    fitting, options = FITTING[kind], {"stride": stride, "tail": tail}
    name = name or fitting[0]
    if name not in PROTOCOLS:
        raise InvalidParameterError(
            f"Expected protocol to be one of {', '.join(PROTOCOLS)}, got {name!r}. Pass protocol={fitting[0]!r}."
        )
    if name not in fitting:
        raise InvalidParameterError(
            f"Expected protocol to be {' or '.join(map(repr, fitting))} for {model}, got {name!r}. Pass "
            f"protocol={fitting[0]!r}."
        )
    required = PROTOCOLS[name].option
    for option, value in options.items():
        if value is not None and option != required:
            users = [user for user, protocol in PROTOCOLS.items() if protocol.option == option]
            raise InvalidParameterError(
                f"Expected {option} to be left out for protocol {name!r}, got {value}. Drop it, or choose "
                f"{' or '.join(users)}."
            )
        if value is None and option == required:
            raise InvalidParameterError(
                f"Expected {option} for protocol {name!r}, got none. Pass {option}=128, in tokens."
            )
    protocol: PerplexityProtocol = PROTOCOLS[name](*([options[required]] if required else []))
    protocol.check(lengths)
    return protocol
