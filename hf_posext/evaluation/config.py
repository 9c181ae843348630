"""Settings of a measurement, declared once: Python keywords, YAML files, and flags derive from this class."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple, ParamSpec, TypeVar, get_type_hints

from ..decode import MAX_TOKENS, check_type, plain, short
from ..errors import InvalidParameterError

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


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
                bound.arguments[name] = plain(bound.arguments[name])
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


MAX_TRIALS = 10_000
"""Most trials per length. All prompts of a length are in memory at once, and each trial is generated."""


def _setting(
    help: str, default: Any = MISSING, *, least: int | None = None, most: int | None = None, **flag: Any
) -> Any:
    """Declare a setting with its help, its bounds, and further options of its flag."""
    return field(default=default, metadata={"help": help, "bounds": (least, most), "flag": flag})


def bounds_in_words(least: float | None, most: float | None) -> str:
    """Return the bounds of a number after its type, such as " of 1 or more"."""
    if least is None:
        return ""
    return f" of {least:,} or more" if most is None else f" from {least:,} to {most:,}"


def _documented(cls: type[T]) -> type[T]:
    """Add the fields of a dataclass of settings to its docstring, each with its type, default, and help."""
    lines = []
    for entry in fields(cls):  # type: ignore[arg-type]
        kind = f"`{str(entry.type).removesuffix(' | None')}`"
        optional = "" if entry.default is MISSING else ", *optional*"
        default = "" if entry.default in (MISSING, None) else f", defaults to `{entry.default!r}`"
        text = f"{entry.name} ({kind}{optional}{default}): {entry.metadata['help']}"
        lines.append(textwrap.fill(text, 119, initial_indent=" " * 8, subsequent_indent=" " * 12))
    cls.__doc__ = "\n".join([f"{(cls.__doc__ or '').rstrip()}\n\n    Args:", *lines])
    return cls


@_documented
@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Settings of [`compare`] and [`evaluate_perplexity`].

    Each field is a keyword argument in Python, a line of a YAML file, and a flag of `hf-posext compare` and
    `evaluate`. `None` selects a default that depends on the model or on other settings. The protocols are defined by
    [`Prefix`], [`Sliding`], [`Rolling`], [`Tail`], [`LegacyYaRN`], [`LegacyLongLoRA`], [`Pseudo`], and [`Seq2Seq`].
    """

    lengths: Sequence[int] = _setting("Context lengths in tokens.")
    factor: float | None = _setting(
        "Target length as a multiple of the trained length, for methods without a factor in brackets.",
        None,
        of="compare",
    )
    target_length: int | None = _setting("Target length in tokens, instead of a factor.", None, of="compare")
    trained_length: int | None = _setting(
        "Trained length in tokens, also of the control, if the config is wrong or lacks it.",
        None,
        least=2,
        most=MAX_TOKENS,
    )
    passkey: int = _setting("Passkey trials at each length; 0 for none.", 0, least=0, most=MAX_TRIALS)
    retrieval: int = _setting(
        "Retrieval trials of each task at each length and depth; 0 for none.", 0, least=0, most=MAX_TRIALS
    )
    tasks: Sequence[str] | None = _setting(
        "Retrieval tasks: passkey, multi-key, multi-value, variable-tracking, common-words. Default: all.", None
    )
    depths: Sequence[float] | None = _setting(
        "Retrieval depths, from 0 (beginning) to 1 (end). Default: 0,0.25,0.5,0.75,1.", None
    )
    chat: bool = _setting("Ask passkeys and retrieval in the tokenizer's chat template.", False)
    longppl: Any = _setting(
        "Also measure LongPPL, the perplexity of key tokens. This evaluator finds them once, at the longest length: "
        "one of the methods by its label ('yarn', or 'yarn x8' if it has several factors), which favours that method, "
        "or a model that reads this length well. On the command line a model is a folder or Hub id that contains a "
        "slash, and in Python a model, or (model, tokenizer) if its tokenizer differs.",
        None,
        metavar="EVALUATOR",
    )
    alpha: float | None = _setting(
        "LongPPL: least gain of a key token by the long context, in nats. Default: 2, as in the paper.", None
    )
    beta: float | None = _setting(
        "LongPPL: least log-probability of a key token given the long context, in nats. Default: -2, as in the paper.",
        None,
    )
    short_length: int | None = _setting(
        "LongPPL: tokens of the short context, which moves by a quarter of its length. Default: half of the trained "
        "length or of the longest length, whichever is less, and at most the paper's 4096.",
        None,
        least=1,
    )
    protocol: str | None = _setting(
        "prefix, sliding, rolling, tail, legacy-yarn, legacy-longlora (decoders), pseudo (encoders), seq2seq "
        "(encoder-decoders). Default: the first that fits the model.",
        None,
    )
    stride: int | None = _setting("Step of the windows of sliding and the legacy protocols, in tokens.", None, least=1)
    tail: int | None = _setting("Number of last tokens that the protocol tail scores.", None, least=1)
    start: int = _setting("Tokens to skip at the beginning of each document, such as front matter.", 0, least=0)
    bos: Literal["auto", "always", "never"] = _setting(
        "BOS before each text: as the tokenizer adds it, always, or never.", "auto"
    )
    prefill_chunk: int | None = _setting(
        "Tokens per forward pass, with earlier tokens in a KV cache, to save memory. Default: all.", None, least=1
    )
    offload_cache: bool = _setting("Keep the KV cache of a prefill in chunks on the CPU.", False)
    seed: int = _setting("Seed of passkeys and bootstrap intervals.", 0, least=0)

    def __post_init__(self) -> None:
        hints = get_type_hints(EvaluationConfig)
        for entry in fields(self):
            value: Any = plain(getattr(self, entry.name))
            least, most = entry.metadata["bounds"]
            object.__setattr__(self, entry.name, value)
            check_type(entry.name, value, hints[entry.name])
            if least is not None and value is not None and not least <= value <= (most or math.inf):
                bounds = bounds_in_words(least, most)
                raise InvalidParameterError(
                    f"Expected {entry.name} to be a whole number{bounds}, got {short(value)}. "
                    f"Pass {entry.name}={entry.default or least}."
                )

    @classmethod
    def of(cls, config: EvaluationConfig | None = None, **settings: Any) -> EvaluationConfig:
        """Return a config with some settings replaced, or a new config.

        Args:
            config ([`EvaluationConfig`], *optional*): source of all other settings.
            settings: fields of this class, by name.

        Raises:
            InvalidParameterError: a name is not a field, a value has the wrong type, or there are no lengths.
        """
        names = [entry.name for entry in fields(cls)]
        for name in settings:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                guess = f" Did you mean {near[0]!r}?" if near else ""
                raise InvalidParameterError(
                    f"Expected a known setting, got {name!r}.{guess} Pass one of {', '.join(names)}."
                )
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


class Criterion(NamedTuple):
    """Thresholds of a key token. Defaults are the paper's.

    Args:
        alpha (`float`, *optional*, defaults to 2.0): least gain by the long context, in nats.
        beta (`float`, *optional*, defaults to -2.0): least log-probability given the long context, in nats.
        short_length (`int`, *optional*, defaults to 4096): tokens of the short context.
        stride (`int`, *optional*, defaults to 1024): number of tokens whose short contexts begin at the same token.
    """

    alpha: float = 2.0
    beta: float = -2.0
    short_length: int = 4096
    stride: int = 1024


def check_criterion(criterion: Criterion, longest: int) -> None:
    """Refuse impossible thresholds, and windows that leave no short context in a row of `longest` tokens."""
    alpha, beta, short_length, stride = criterion
    for name, hint in get_type_hints(Criterion).items():
        check_type(name, getattr(criterion, name), hint)
    if not (math.isfinite(alpha) and math.isfinite(beta) and beta < 0):
        raise InvalidParameterError(
            f"Expected alpha and beta to be finite and beta below 0, in nats, got {alpha} and {beta}. Pass alpha=2, "
            "beta=-2."
        )
    if short_length < 1 or stride < 1 or short_length + stride >= longest:
        raise InvalidParameterError(
            f"Expected short_length and stride to be 1 or more and their sum below {longest} tokens, got "
            f"{short_length} and {stride}, so that no context is short. Pass short_length={max(1, longest // 8)}."
        )


def default_criterion(thresholds: Mapping[str, Any], trained_length: int | None, longest: int) -> Criterion:
    """Return the requested criterion, with defaults from the paper and windows that fit.

    The paper's short context has 4096 tokens. All of its models were trained on that length, which is well below the
    measured lengths. The default here is half of the trained length, so that windows stay inside the trained length,
    or half of the longest length if that is less, and at most 4096. The stride is a quarter of it, as in the paper.
    """
    values = {name: value for name, value in thresholds.items() if value is not None}
    short = values.setdefault("short_length", min(4096, (trained_length or longest) // 2, longest // 2))
    return Criterion(**values, stride=max(1, short // 4))
