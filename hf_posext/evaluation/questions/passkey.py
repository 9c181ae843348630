"""Pass-key retrieval: a number hidden in filler, asked for at the end.

Mohtashami and Jaggi, 2023: Landmark Attention, https://arxiv.org/abs/2305.16300.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from ...errors import InvalidParameterError
from ...patching.modes import evaluation_mode
from ..scoring.scorer import BATCH_TOKENS, TokenScorer
from ..texts.tokens import Bos, check_lengths, special_prefix, token_ids

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "What is the pass key? The pass key is"
SLACK = 2
"""Tokens left beside the answer's own, for a tokenizer that writes it otherwise after a text than alone."""


@dataclass(frozen=True)
class PasskeyPrompt:
    """
    One trial.

    Args:
        key (`str`): five digits.
        tokens (`list[int]`): the prompt, which with the answer fits the length.
        depth (`float`): where the key is, from 0 (beginning) to 1 (end).
    """

    key: str
    tokens: list[int]
    depth: float


def passkey_prompts(tokenizer: Any, length: int, trials: int, seed: int, bos: Bos = "auto") -> list[PasskeyPrompt]:
    """
    Prompts of equal size, so that a batch needs no padding; the same for every model and method.

    The key and its depth follow from `(seed, length, trial)` alone. The filler is cut at its beginning to fit, and the
    key stands on a line of its own between two whole lines of it.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the model's.
        length (`int`): tokens of prompt and answer together.
        trials (`int`): how many prompts.
        seed (`int`): of keys and depths.
        bos (`str`, *optional*, defaults to `"auto"`): as in [`special_prefix`].

    Raises:
        InvalidParameterError: the length does not hold the key and the question.
    """
    prefix = special_prefix(tokenizer, bos)
    filler, question = token_ids(tokenizer, FILLER), token_ids(tokenizer, QUESTION)
    draws = [random.Random(f"{seed}-{length}-{trial}") for trial in range(trials)]
    keys = [f"{draw.randint(10_000, 99_999)}" for draw in draws]
    answer = answer_size(tokenizer, keys)
    prompts = []
    for draw, key in zip(draws, keys, strict=True):
        needle = token_ids(tokenizer, NEEDLE.format(key=key))
        room = length - len(prefix) - len(needle) - len(question) - answer
        if room < 0:
            raise InvalidParameterError(
                f"pass keys need at least {length - room} tokens, and one length is {length}; "
                "leave it out, or ask for no pass keys"
            )
        lines, rest = divmod(room, len(filler))
        before = draw.randint(0, lines)
        tokens = [*prefix, *haystack(filler, room, [(before, needle)]), *question]
        prompts.append(PasskeyPrompt(key, tokens, (rest + before * len(filler)) / max(1, room)))
    return prompts


def haystack(filler: list[int], room: int, needles: Sequence[tuple[int, list[int]]]) -> list[int]:
    """
    Filler with needles in it: `room` tokens of filler, cut at its beginning to fit, and all of the needles' own.

    Args:
        filler (`list[int]`): tokens of one line.
        room (`int`): tokens that filler takes in all.
        needles (`Sequence[tuple[int, list[int]]]`): whole lines of filler before each needle, ascending, and its
            tokens.
    """
    lines, rest = divmod(room, len(filler))
    tokens, written = filler[len(filler) - rest :], 0
    for before, needle in needles:
        tokens += [*filler * (before - written), *needle]
        written = before
    return tokens + filler * (lines - written)


def answer_size(tokenizer: Any, keys: Sequence[str]) -> int:
    """Tokens to leave for, and to generate as, an answer."""
    return SLACK + max(len(token_ids(tokenizer, f" {key}")) for key in keys)


def passkey_accuracy(
    model: nn.Module,
    tokenizer: Any,
    lengths: Sequence[int],
    trials: int,
    seed: int = 0,
    bos: Bos = "auto",
    *,
    max_new_tokens: int | None = None,
    on_length: Callable[[], Any] | None = None,
) -> dict[int, float]:
    """
    Share of pass keys that greedy decoding gives back, by length.

    Args:
        model (`PreTrainedModel`): a causal language model, patched or not.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        lengths (`Sequence[int]`): tokens of prompt and answer together.
        trials (`int`): prompts per length, each with a key and a depth of its own.
        seed (`int`, *optional*, defaults to 0): of keys and depths.
        bos (`str`, *optional*, defaults to `"auto"`): whether BOS stands first: as the tokenizer has it, `"always"`,
            or `"never"`.
        max_new_tokens (`int`, *optional*): tokens to generate; by default what the longest key takes, and two more.
        on_length (`Callable`, *optional*): called after each length (a progress bar).

    Returns:
        `dict[int, float]`: length to accuracy, from 0 to 1. An answer is right if it begins with the key.

    Raises:
        InvalidParameterError: no trials, or a length that does not hold the prompt.
        UnsupportedModelError: no causal language model.
    """
    if trials < 1:
        raise InvalidParameterError(f"trials is {trials}; give the number of pass keys per length, 1 or more")
    unwrapped = TokenScorer(model).model
    accuracy = {}
    with evaluation_mode(unwrapped):
        for length in check_lengths(lengths):
            prompts = passkey_prompts(tokenizer, length, trials, seed, bos)
            new_tokens = max_new_tokens or answer_size(tokenizer, [prompt.key for prompt in prompts])
            answers = ask(unwrapped, tokenizer, [prompt.tokens for prompt in prompts], new_tokens)
            right = sum(
                answer.lstrip().startswith(prompt.key) for answer, prompt in zip(answers, prompts, strict=True)
            )
            accuracy[length] = right / trials
            if on_length is not None:
                on_length()
    return accuracy


def ask(model: Any, tokenizer: Any, prompts: Sequence[list[int]], new_tokens: int) -> list[str]:
    """What greedy decoding answers to prompts of equal size, without special tokens."""
    answers: list[str] = []
    per_batch = max(1, BATCH_TOKENS // (len(prompts[0]) + new_tokens))
    for at in range(0, len(prompts), per_batch):
        batch = torch.tensor(prompts[at : at + per_batch], device=model.device)
        output = generate_greedily(model, batch, new_tokens)
        answers += tokenizer.batch_decode(output[:, batch.shape[1] :], skip_special_tokens=True)
    return answers


def generate_greedily(model: Any, input_ids: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """Greedy continuation of a batch without padding, whatever sampling the model's own generation config asks for."""
    eos = model.generation_config.eos_token_id
    pad = model.generation_config.pad_token_id
    config = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        use_cache=True,
        eos_token_id=eos,
        pad_token_id=pad if pad is not None else (eos[0] if isinstance(eos, list) else eos),
    )
    output: torch.Tensor = model.generate(
        input_ids, attention_mask=torch.ones_like(input_ids), generation_config=config
    )
    return output
