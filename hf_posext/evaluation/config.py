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
    """Refuse a value of another type than its hint. A bool is not a number, a string not a sequence, "" not text.

    Raises:
        InvalidParameterError: it is.
    """
    if not _fits(value, hint):
        raise InvalidParameterError(f"Expected {name} to be {_in_words(hint)}, got {short(repr(value))}.")


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator of a public function: arguments of other types than their annotations are refused, as by
    [`check_type`].

    Numbers of numpy are passed on as Python's. An argument whose annotation contains a type that the module imports
    for type checkers only is left to the function.
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
    if arguments:  # of a union
        return any(_fits(value, argument) for argument in arguments)
    kinds = (int, float) if hint is float else hint
    return isinstance(value, kinds) and (hint is bool or not isinstance(value, bool)) and value != ""


def _plain(value: Any) -> Any:
    """Convert numbers and arrays of numpy to Python's own types."""
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
    `evaluate`. `None` means the default that depends on the model or on other settings.

    Args:
        lengths (`Sequence[int]`): context lengths in tokens.
        factor (`float`, *optional*): factor of the methods that do not contain one; of [`compare`] only.
        target_length (`int`, *optional*): tokens, instead of a factor; of [`compare`] only.
        trained_length (`int`, *optional*): trained length in tokens, where the config is wrong about it; also the
            control's.
        protocol (`str`, *optional*): for a causal language model `"prefix"` ([`Prefix`]), `"sliding"` ([`Sliding`]),
            `"rolling"` ([`Rolling`]), `"tail"` ([`Tail`]), or an average as once published, `"legacy-yarn"` or
            `"legacy-longlora"`; `"pseudo"` ([`Pseudo`]) for an encoder, `"seq2seq"` ([`Seq2Seq`]) for an
            encoder-decoder. The first that fits the model if not given.
        stride (`int`, *optional*): tokens that overlapping windows move by (`"sliding"`, legacy protocols); required
            there, refused elsewhere.
        tail (`int`, *optional*): tokens that protocol `"tail"` counts; required there, refused elsewhere.
        start (`int`, *optional*, defaults to 0): tokens to leave out at the beginning of each document (front matter).
        bos (`str`, *optional*, defaults to `"auto"`): whether BOS stands before each text: `"auto"`, as the tokenizer
            has it; `"always"`, also where the tokenizer has lost it; `"never"`.
        passkey (`int`, *optional*, defaults to 0): passkey trials at each length; 0 for none.
        retrieval (`int`, *optional*, defaults to 0): trials of each task at each length and depth; 0 for none.
        tasks (`Sequence[str]`, *optional*): tasks of retrieval, see [`task_prompt`]; all by default.
        depths (`Sequence[float]`, *optional*): depths of retrieval, from 0 (beginning) to 1 (end); by default five.
        chat (`bool`, *optional*, defaults to `False`): ask passkeys and retrieval in the chat template of the
            tokenizer.
        longppl (`str`, `PreTrainedModel` or `tuple`, *optional*): finds the key tokens of LongPPL
            ([`find_key_tokens`]), once, at the longest length, for all methods and the control. The label of one of
            the methods (`"yarn"`, or `"yarn x8"` where it has several factors), which is thereby favoured; or another
            model that reads this length well; or `(model, tokenizer)`, if its tokenizer is another.
        alpha (`float`, *optional*): nats that the long context must gain for a token to be key; 2, as in the paper.
        beta (`float`, *optional*): log-probability, in nats, that a key token must have given the long context; -2, as
            in the paper.
        short_length (`int`, *optional*): tokens of LongPPL's short context, which moves by a quarter of it; by default
            half of the trained length, or of the longest if that is less, at most the paper's 4096.
        prefill_chunk (`int`, *optional*): tokens that go through the model at a time, those before them in a KV cache;
            bounds memory. All at once by default.
        offload_cache (`bool`, *optional*, defaults to `False`): keep that cache on the CPU.
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
            config ([`EvaluationConfig`], *optional*): the others come from here.
            settings: fields of this class, by name.

        Raises:
            InvalidParameterError: a name that is not a field, or no lengths.
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
