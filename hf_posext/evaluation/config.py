"""Settings of a measurement, declared once: Python keywords, YAML files, and flags derive from this class."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from types import NoneType
from typing import Any, Literal, ParamSpec, TypeVar, get_args, get_origin, get_type_hints

import numpy as np

from ..decode import short
from ..errors import InvalidParameterError

P = ParamSpec("P")
R = TypeVar("R")

WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "text", NoneType: "None"}


def check_type(name: str, value: Any, hint: Any) -> None:
    """Check that a value has the type of its hint.

    A bool does not count as a number, a string does not count as a sequence, and `""` does not count as text.

    Raises:
        InvalidParameterError: the value has another type.
    """
    if not _fits(value, hint):
        raise InvalidParameterError(f"Expected {name} to be {_in_words(hint)}, got {short(repr(value))}.")


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a public function so that its arguments are checked against their annotations with [`check_type`].

    NumPy numbers are converted to Python numbers. An argument is not checked if its annotation contains a type that
    the module imports for type checkers only.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        bound = signature.bind(*args, **kwargs)
        for name, hint in _hints(function).items():
            if name in bound.arguments:
                bound.arguments[name] = _plain(bound.arguments[name])
                check_type(name, bound.arguments[name], hint)
        return function(*bound.args, **bound.kwargs)

    return call


@functools.cache
def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the types of a function's named parameters, as far as its module resolves them."""
    hints = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            with suppress(NameError):
                hints[name] = eval(parameter.annotation, function.__globals__)
    return hints


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin is Callable:
        return callable(value)
    if origin is Literal:
        return isinstance(value, str) and value in arguments
    if origin is Sequence:
        is_sequence = isinstance(value, Sequence) and not isinstance(value, str | bytes)
        return is_sequence and all(_fits(item, arguments[0]) for item in value)
    if arguments:  # a union
        return any(_fits(value, argument) for argument in arguments)
    kinds = (int, float) if hint is float else hint
    return isinstance(value, kinds) and (hint is bool or not isinstance(value, bool)) and value != ""


def _plain(value: Any) -> Any:
    """Convert NumPy numbers and arrays to Python's own types."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value))
    return value


def _in_words(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return f"one of {', '.join(get_args(hint))}"
    if get_origin(hint) is Sequence:
        return f"a list of {WORDS[get_args(hint)[0]].removeprefix('a ')}s".replace("texts", "names")
    if get_origin(hint) is Callable:
        return "a function"
    if get_args(hint):
        return " or ".join(map(_in_words, get_args(hint)))
    return WORDS.get(hint) or f"{'an' if hint.__name__[0] in 'AEIOU' else 'a'} {hint.__name__}"


def _setting(help: str, default: Any = None, **flag: Any) -> Any:
    """Declare a setting with its help and further options of its flag."""
    return field(default=default, metadata={"help": help, "flag": flag})


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Settings of [`compare`] and [`evaluate_perplexity`].

    Each field is a keyword argument in Python, a line of a YAML file, and a flag of `hf-posext compare` and
    `evaluate`. `None` selects a default that depends on the model or on other settings.

    Args:
        lengths (`Sequence[int]`): context lengths in tokens.
        factor (`float`, *optional*): factor of the methods that do not contain one. For [`compare`] only.
        target_length (`int`, *optional*): target length in tokens, instead of a factor. For [`compare`] only.
        trained_length (`int`, *optional*): trained length in tokens, if the model's config lacks it or is wrong. It
            also applies to the control.
        protocol (`str`, *optional*): for a causal language model `"prefix"` ([`Prefix`]), `"sliding"` ([`Sliding`]),
            `"rolling"` ([`Rolling`]), `"tail"` ([`Tail`]), or one of the published averages `"legacy-yarn"` and
            `"legacy-longlora"`. `"pseudo"` ([`Pseudo`]) for an encoder, and `"seq2seq"` ([`Seq2Seq`]) for an
            encoder-decoder. Defaults to the first protocol that fits the model.
        stride (`int`, *optional*): step of overlapping windows in tokens. Required by `"sliding"` and the legacy
            protocols, and refused by all others.
        tail (`int`, *optional*): number of last tokens that the protocol `"tail"` scores. Required by `"tail"`, and
            refused by all other protocols.
        start (`int`, *optional*, defaults to 0): tokens to skip at the beginning of each document (front matter).
        bos (`str`, *optional*, defaults to `"auto"`): BOS before each text. `"auto"` follows the tokenizer,
            `"always"` adds BOS even if the tokenizer does not, and `"never"` adds none.
        passkey (`int`, *optional*, defaults to 0): passkey trials at each length; 0 for none.
        retrieval (`int`, *optional*, defaults to 0): trials of each task at each length and depth; 0 for none.
        tasks (`Sequence[str]`, *optional*): retrieval tasks, see [`task_prompt`]. Defaults to all.
        depths (`Sequence[float]`, *optional*): retrieval depths, from 0 (beginning) to 1 (end). Defaults to five.
        chat (`bool`, *optional*, defaults to `False`): pose passkey and retrieval prompts in the tokenizer's chat
            template.
        longppl (`str`, `PreTrainedModel` or `tuple`, *optional*): evaluator that finds the key tokens of LongPPL
            ([`find_key_tokens`]). They are found once, at the longest length, for all methods and the control. Pass
            the label of one of the methods (`"yarn"`, or `"yarn x8"` if it has several factors), which favours that
            method. Or pass another model that reads this length well, or `(model, tokenizer)` if its tokenizer
            differs.
        alpha (`float`, *optional*): least gain of a key token by the long context, in nats. Defaults to 2, as in the
            paper.
        beta (`float`, *optional*): least log-probability of a key token given the long context, in nats. Defaults to
            -2, as in the paper.
        short_length (`int`, *optional*): tokens of LongPPL's short context, which moves by a quarter of its length.
            Defaults to half of the trained length or half of the longest length, whichever is less, and at most the
            paper's 4096.
        prefill_chunk (`int`, *optional*): tokens per forward pass, with earlier tokens in a KV cache, to bound memory.
            Defaults to all tokens at once.
        offload_cache (`bool`, *optional*, defaults to `False`): keep the KV cache on the CPU.
        seed (`int`, *optional*, defaults to 0): seed of the bootstrap and of the passkeys.
    """

    lengths: Sequence[int] = field(metadata={"help": "Context lengths in tokens, separated by commas."})
    factor: float | None = _setting("Target length as a multiple of the trained length.", of="compare")
    target_length: int | None = _setting("Target length in tokens, instead of a factor.", of="compare")
    trained_length: int | None = _setting("Trained length in tokens, if the config is wrong or lacks it.")
    passkey: int = _setting("Passkey trials at each length; 0 for none.", 0, min=0)
    retrieval: int = _setting("Trials of each task at each length and depth; 0 for none.", 0, min=0)
    tasks: Sequence[str] | None = _setting(
        "Tasks of --retrieval: passkey, multi-key, multi-value, variable-tracking, common-words. Default: all."
    )
    depths: Sequence[float] | None = _setting("Depths of --retrieval, from 0 to 1. Default: 0,0.25,0.5,0.75,1.")
    chat: bool = _setting("Ask passkeys and retrieval in the tokenizer's chat template.", False)
    longppl: Any = _setting(
        "Also measure the perplexity of key tokens. They are found by one of the methods (its label) or by a model (a "
        "folder or Hub id that contains a slash).",
        metavar="EVALUATOR",
    )
    alpha: float | None = _setting(
        "For --longppl: least gain of a key token by the long context, in nats. Default: 2, as in the paper."
    )
    beta: float | None = _setting(
        "For --longppl: least log-probability of a key token, in nats. Default: -2, as in the paper."
    )
    short_length: int | None = _setting(
        "For --longppl: tokens of the short context. Default: half the trained length, at most 4096."
    )
    protocol: str | None = _setting(
        "prefix, sliding, rolling, tail, legacy-yarn, legacy-longlora (decoders), pseudo (encoders), seq2seq. "
        "Default: the first that fits the model."
    )
    stride: int | None = _setting("Step of overlapping windows, in tokens.")
    tail: int | None = _setting("Tokens scored by the protocol tail.")
    start: int = _setting("Tokens to skip at the beginning of each document.", 0)
    bos: Literal["auto", "always", "never"] = _setting(
        "BOS before each text: as the tokenizer adds it, always, or never.", "auto"
    )
    prefill_chunk: int | None = _setting("Tokens per forward pass, to save memory. Default: all.")
    offload_cache: bool = _setting("With --prefill-chunk: keep the KV cache on the CPU.", False)
    seed: int = _setting("Seed of passkeys and bootstrap intervals.", 0)

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(EvaluationConfig).items():
            object.__setattr__(self, name, _plain(getattr(self, name)))
            check_type(name, getattr(self, name), hint)

    @classmethod
    def of(cls, config: EvaluationConfig | None = None, **settings: Any) -> EvaluationConfig:
        """Return a config with some settings replaced, or a new config.

        Args:
            config ([`EvaluationConfig`], *optional*): source of all other settings.
            settings: fields of this class, by name.

        Raises:
            InvalidParameterError: a name is not a field, a value has the wrong type, or there are no lengths.
        """
        known = [entry.name for entry in fields(cls)]
        for name in settings:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                guess = f"did you mean {near[0]!r}? " if near else ""
                raise InvalidParameterError(f"unknown setting {name!r}; {guess}there are: {', '.join(known)}")
        if config is not None:
            return replace(config, **settings)
        if "lengths" not in settings:
            raise InvalidParameterError("Expected lengths, got none. Pass lengths=[512, 1024].")
        return cls(**settings)

    def settings(self) -> dict[str, Any]:
        """Return all settings in plain JSON types for the provenance; models become `None`."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        values["longppl"] = self.longppl if isinstance(self.longppl, str) else None
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
