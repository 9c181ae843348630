"""Perplexity of models that are not causal: masked tokens of an encoder, teacher-forced ones of an encoder-decoder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto

from ..errors import InvalidParameterError, UnsupportedModelError
from ..patching.detect import unwrap
from .protocols import DECODER_PROTOCOLS, Measurement, PerplexityProtocol, make_protocol
from .scoring import BATCH_TOKENS, hidden_states, require_finite, scored_model, with_hidden_states
from .tokens import TokenizedDocuments, token_ids

SAMPLES = 64
"""Tokens of a document that are masked, each in a forward of its own; eight novels give 512 of them."""

TARGETS = 128
"""Tokens that a decoder is asked for at most."""

FITTING = {"causal": DECODER_PROTOCOLS, "masked": ("pseudo",), "seq2seq": ("seq2seq",)}
"""The protocols by the kind of language model, the one that is taken if none is asked for first."""


def model_kind(classes: Iterable[str], config: PreTrainedConfig) -> str:
    """
    `"masked"` for an encoder with a masked-LM head, `"seq2seq"` for an encoder-decoder with a head, else `"causal"`.

    Args:
        classes (`Iterable[str]`): names of the model's classes, or the `architectures` of its config.
        config (`PreTrainedConfig`): of the model.
    """
    known = set(classes)
    if getattr(config, "is_encoder_decoder", False):
        return "seq2seq" if known & _names(modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES) else "causal"
    # XLM and Flaubert have one class for both, and a config that tells which it is.
    is_masked = known & _names(modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES) and not getattr(
        config, "causal", False
    )
    return "masked" if is_masked else "causal"


def choose_protocol(name: str | None, model: nn.Module, lengths: list[int], stride: int | None) -> PerplexityProtocol:
    """
    The protocol of that name, or the one that fits the model.

    Raises:
        InvalidParameterError: no such protocol, one that does not fit the model, or as [`make_protocol`].
    """
    base = unwrap(model)
    fitting = FITTING[model_kind((cls.__name__ for cls in type(base).__mro__), base.config)]
    name = name or fitting[0]
    known = [protocol for protocols in FITTING.values() for protocol in protocols]
    if name not in known:
        raise InvalidParameterError(f"protocol is {name!r}; choose one of {', '.join(known)}")
    if name not in fitting:
        raise InvalidParameterError(
            f"protocol {name!r} does not fit {type(base).__name__}; choose {' or '.join(map(repr, fitting))}"
        )
    if name in DECODER_PROTOCOLS:
        return make_protocol(name, lengths, stride)
    if stride is not None:
        raise InvalidParameterError(f"stride is {stride}, and protocol {name!r} has none; leave it out")
    return Pseudo() if name == "pseudo" else Seq2Seq()


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What a tokenizer puts before and after a text by itself: `[CLS]` and `[SEP]`, or nothing and `</s>`."""
    plain, whole = token_ids(tokenizer, "a"), tokenizer("a")["input_ids"]
    begin = next(at for at in range(len(whole)) if whole[at : at + len(plain)] == plain)
    return whole[:begin], whole[begin + len(plain) :]


class _Scorer:
    """A model, and the special tokens that belong around each text."""

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        self.model: Any = scored_model(model)
        before, after = special_tokens(tokenizer)
        self.before, self.after = torch.tensor(before, dtype=torch.long), torch.tensor(after, dtype=torch.long)

    @property
    def special(self) -> int:
        """How many special tokens there are."""
        return len(self.before) + len(self.after)

    def around(self, text: torch.Tensor) -> torch.Tensor:
        """The tokens of a text with the special ones."""
        return torch.cat([self.before, text, self.after])


class MaskedScorer(_Scorer):
    """
    Scores masked tokens with an encoder.

    Args:
        model (`torch.nn.Module`): with a masked-LM head, also inside a PEFT or DDP wrapper.
        tokenizer (`PreTrainedTokenizerBase`): the model's.

    Raises:
        InvalidParameterError: the tokenizer has no mask token.
        UnsupportedModelError: a model with prompt tuning.
    """

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        super().__init__(model, tokenizer)
        if tokenizer.mask_token_id is None:
            raise InvalidParameterError("the tokenizer has no mask token; load the one that belongs to the encoder")
        self.mask: int = tokenizer.mask_token_id
        self._trunk: nn.Module = self.model.base_model
        self._checked = False

    @torch.inference_mode()
    def token_nll(self, texts: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """
        NLL of one token of each text, that token masked.

        Args:
            texts (`torch.LongTensor` of shape `(texts, length)`): without special tokens.
            at (`torch.LongTensor` of shape `(texts,)`): which token of each.

        Returns:
            `torch.FloatTensor` of shape `(texts,)`, float32 on the CPU, in nats.
        """
        targets = texts.gather(1, at[:, None])[:, 0]
        masked = texts.scatter(1, at[:, None], self.mask)
        inputs = torch.stack([self.around(text) for text in masked]).to(self.model.device)
        at = at + len(self.before)
        if not self._checked:
            self._check(inputs[:1], at[:1])
        size = max(1, BATCH_TOKENS // inputs.shape[1])
        begins = range(0, len(inputs), size)
        logits = torch.cat([self._logits(inputs[b : b + size], at[b : b + size]).float().cpu() for b in begins])
        return F.cross_entropy(logits, targets, reduction="none")

    def _logits(self, inputs: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """Logits at one place of each row, of shape `(rows, vocabulary)`; the head is given no other."""

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
        """A head that needs more than its own token is refused: it would be scored wrongly."""
        full = self.model(input_ids=inputs).logits[0, at[0]]
        deviation = float((self._logits(inputs, at)[0] - full).abs().max())
        if deviation > max(1e-4, 8 * torch.finfo(full.dtype).eps) * float(full.abs().max()):
            raise UnsupportedModelError(
                f"{type(self.model).__name__} has a head that reads more than the token that it predicts (logits "
                f"differ by {deviation:.2g}), so it has no pseudo-perplexity"
            )
        self._checked = True


class Seq2SeqScorer(_Scorer):
    """
    Scores a text that continues another, with an encoder-decoder.

    Args:
        model (`torch.nn.Module`): with a language-model head, also inside a PEFT or DDP wrapper.
        tokenizer (`PreTrainedTokenizerBase`): the model's.

    Raises:
        InvalidParameterError: the model does not say which token its decoder starts with.
        UnsupportedModelError: a model with prompt tuning.
    """

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        super().__init__(model, tokenizer)
        generation = getattr(self.model, "generation_config", None)
        said = (getattr(config, "decoder_start_token_id", None) for config in (generation, self.model.config))
        start = next((token for token in said if token is not None), None)
        if start is None:
            raise InvalidParameterError(
                f"{type(self.model).__name__} does not say what its decoder starts with; set "
                "model.generation_config.decoder_start_token_id (mBART: the token of the language)"
            )
        self.start = torch.cat([torch.tensor([start]), self.before])

    @torch.inference_mode()
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
        return F.cross_entropy(logits, targets, reduction="none")


@dataclass(frozen=True)
class Pseudo:
    """
    Pseudo-perplexity of an encoder (Salazar et al. 2020, arXiv 1910.14659): masked tokens given all others.

    A text of length `L` is the first `n = L - specials` tokens of a document, with the tokenizer's special tokens
    around it. Of its tokens, `S = min(samples, n)` are scored, the middle one of each of `S` equal stretches (token
    `(2 j + 1) n // (2 S)` for `j` below `S`); each is masked alone, in a forward of its own, since other masks would
    be missing from its context. The tail is the later half of them. All methods score the same tokens.

    The control scores them in a window of the trained length `T`, special tokens included: `w = T - specials` tokens
    that begin `w // 2` before the scored one, or nearer to it where the window would stick out of the text.

    Args:
        samples (`int`, *optional*, defaults to 64): tokens of each document that are scored at each length.
    """

    samples: int = SAMPLES
    name: ClassVar[str] = "pseudo"

    def scorer(self, model: nn.Module, tokenizer: Any) -> MaskedScorer:
        return MaskedScorer(model, tokenizer)

    def measure(
        self, scorer: MaskedScorer, documents: TokenizedDocuments, lengths: list[int], multipass: bool
    ) -> Iterator[Measurement]:
        return self._measure(scorer, documents, lengths, lengths[-1])

    def measure_control(
        self, scorer: MaskedScorer, documents: TokenizedDocuments, lengths: list[int], trained_length: int
    ) -> Iterator[Measurement]:
        return self._measure(scorer, documents, lengths, trained_length)

    def _measure(
        self, scorer: MaskedScorer, documents: TokenizedDocuments, lengths: list[int], longest: int
    ) -> Iterator[Measurement]:
        """In texts of at most `longest` tokens, special ones included."""
        _require_room(min(lengths[0], longest), scorer.special + 1)
        for length in lengths:
            count = length - scorer.special
            size = min(length, longest) - scorer.special
            scored = min(self.samples, count)
            places = (2 * torch.arange(scored) + 1) * count // (2 * scored)
            begins = (places - size // 2).clamp(0, count - size)
            for index, row in enumerate(_texts(documents)):
                texts = torch.stack([row[begin : begin + size] for begin in begins.tolist()])
                nll = scorer.token_nll(texts, places - begins).double().numpy()
                require_finite(nll, documents.ids[index], places.tolist())
                yield Measurement(length, index, nll, tail=(scored + 1) // 2)


@dataclass(frozen=True)
class Seq2Seq:
    """
    Perplexity of the text that follows what an encoder has read.

    Of the first `L` tokens, special ones of the encoder's text included, the encoder reads the first `L - K` and the
    decoder is teacher-forced on the next `K = min(128, L // 4)`: it is given its start token, what the tokenizer puts
    before a text, and the targets before the one that is scored. All of them lie in the second half of the text, and
    so in the tail. The control has the same targets, and the encoder reads of its text the last tokens only, so many
    that they are the trained length with the special ones.
    """

    name: ClassVar[str] = "seq2seq"

    def scorer(self, model: nn.Module, tokenizer: Any) -> Seq2SeqScorer:
        return Seq2SeqScorer(model, tokenizer)

    def measure(
        self, scorer: Seq2SeqScorer, documents: TokenizedDocuments, lengths: list[int], multipass: bool
    ) -> Iterator[Measurement]:
        return self._measure(scorer, documents, lengths, lengths[-1])

    def measure_control(
        self, scorer: Seq2SeqScorer, documents: TokenizedDocuments, lengths: list[int], trained_length: int
    ) -> Iterator[Measurement]:
        return self._measure(scorer, documents, lengths, trained_length)

    def _measure(
        self, scorer: Seq2SeqScorer, documents: TokenizedDocuments, lengths: list[int], longest: int
    ) -> Iterator[Measurement]:
        """With an encoder that reads at most `longest` tokens, special ones included."""
        _require_room(min(lengths[0] - lengths[0] // 4, longest), scorer.special + 1)
        _require_room(lengths[0], 4)
        for length in lengths:
            count = min(TARGETS, length // 4)
            end = length - count - scorer.special
            begin = max(0, end + scorer.special - longest)
            for index, row in enumerate(_texts(documents)):
                nll = scorer.token_nll(row[begin:end], row[end : end + count]).double().numpy()
                require_finite(nll, documents.ids[index], list(range(end, end + count)))
                yield Measurement(length, index, nll, tail=count)


def _texts(documents: TokenizedDocuments) -> torch.Tensor:
    """The rows without the BOS that they begin with: it is one of the special tokens around a text here."""
    return documents.tokens[:, int(documents.bos) :]


def _require_room(length: int, needed: int) -> None:
    if length < needed:
        raise InvalidParameterError(f"a text of {length} tokens is too short to score; give {needed} or more")


def _names(mapping: dict[str, Any]) -> set[str]:
    return {name for names in mapping.values() for name in ([names] if isinstance(names, str) else names)}
