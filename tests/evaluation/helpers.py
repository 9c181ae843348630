"""Shared by the tests of the evaluation: a character tokenizer, texts, and the naive loops that all must equal."""

from __future__ import annotations

import random
import string
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast

from hf_posext.decode import required_keys
from hf_posext.evaluation.rows import DocumentRecord

BOS, UNKNOWN = 1, 2

DOCUMENT_KEYS = required_keys(DocumentRecord)
LONGPPL_KEYS = ("longppl", "longppl_ci95", "longppl_truncated", "key_tokens")
PASSKEY_KEYS = ("passkey", "passkey_trials")
KEY_TOKEN_KEYS = ("key_nll_sum", "key_tokens")
CHARACTERS = string.ascii_letters + string.digits + " .?\n"


def character_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """One token per character, below 128; with a BOS that it adds by itself, or has but does not add."""
    vocabulary = {"<pad>": 0, "<s>": BOS, "<unk>": UNKNOWN, **{c: 3 + i for i, c in enumerate(CHARACTERS)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>", pad_token="<pad>")


def random_texts(count: int, size: int) -> list[str]:
    """Texts of that many characters, the same on every call."""
    draw = random.Random(0)
    return ["".join(draw.choices(CHARACTERS, k=size)) for _ in range(count)]


@torch.no_grad()
def naive_nll(model: nn.Module, ids: torch.Tensor) -> np.ndarray:
    """NLL of tokens 1, 2, ... of one row, from full logits, in float64."""
    log_probabilities = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
    return -log_probabilities[:-1].gather(1, ids[1:, None])[:, 0].numpy()


def naive_windowed_nll(model: nn.Module, ids: torch.Tensor, window: int, stride: int, bos: int) -> np.ndarray:
    """NLL of each token after a prefix of `bos` tokens, or of tokens 1, 2, ..., by a forward of its own."""
    nll = []
    for token in range(max(1, bos), len(ids)):
        moves = max(0, -(-(token + 1 - window) // stride))  # how often the window moved until it held the token
        begin = moves * stride
        context = torch.cat([ids[:bos], ids[bos + begin : token + 1]])
        nll.append(naive_nll(model, context)[-1])
    return np.array(nll)


def naive_contexts(protocol: Any, row: torch.Tensor, length: int, bos: int) -> Iterator[tuple[int, torch.Tensor]]:
    """The definition: each token that a protocol scores, and the tokens that it is given."""
    total = len(row)
    if protocol.name in ("prefix", "tail"):
        for token in range(max(1, bos, 0 if protocol.name == "prefix" else length - protocol.tokens), length):
            yield token, row[:token]
    elif protocol.name in ("sliding", "legacy-yarn"):
        for token in range(max(1, bos), total):
            begin = max(0, -(-(token + 1 - length) // protocol.stride)) * protocol.stride
            yield token, torch.cat([row[:bos], row[bos + begin : token]])
    elif protocol.name == "rolling":
        for token in range(max(1, bos), total):
            end = min((token - 1) // length * length + 1 + length, total)
            yield token, row[max(0, end - 1 - length) : token]
    else:
        for begin in list(range(0, total - length, protocol.stride))[:-1]:
            for token in range(begin + 1, begin + length):
                yield token, row[begin:token]


def naive_protocol_nll(protocol: Any, model: nn.Module, row: torch.Tensor, length: int, bos: int) -> np.ndarray:
    """NLL of each token that a protocol scores, by a forward of its own over exactly the context that it defines."""
    pairs = naive_contexts(protocol, row, length, bos)
    return np.array([naive_nll(model, torch.tensor([*context, row[token]]))[-1] for token, context in pairs])
