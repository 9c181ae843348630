"""Options of commands: those that several share, those of dataclasses, and defaults from a YAML file."""

from __future__ import annotations

import difflib
import functools
import inspect
import shlex
from collections.abc import Callable, Collection, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import typer
import yaml

from ..errors import InvalidParameterError
from .console import say

if TYPE_CHECKING:
    from ..evaluation.documents import Documents
    from ..methods import Method

Number = TypeVar("Number", int, float)

FORMER = {"--original-length": "--trained-length"}
"""Former names of options. They work, and print a warning."""

LISTS = ("methods", "lengths", "tasks", "depths", "targets")
"""Settings that contain several values: a YAML list, or text with commas as on the command line."""

NEVER = ("config", "resume")
"""Options of a single call, which are not settings of a run."""

LARGEST_SEED = 2**32 - 1
"""Largest seed that NumPy, torch and Python all accept."""


def use_config(context: typer.Context, path: Path | None) -> Path | None:
    """Make the settings of a YAML file the defaults of a command's options. This is the callback of `--config`.

    The option must be eager, because it has to be read before the others. Values are passed as they would be typed on
    the command line, so that the same code checks both.
    """
    if path is not None:
        options = {parameter.name: parameter for parameter in context.command.params if parameter.name}
        flags = {name for name, option in options.items() if getattr(option, "is_flag", False)}
        settings = read_config(path, options.keys() - set(NEVER), flags)
        context.default_map = {**(context.default_map or {}), **settings}
    return path


def read_config(path: Path, names: Collection[str], flags: Collection[str]) -> dict[str, str]:
    """Return the settings in a YAML file, as text by option name. An empty value leaves the default.

    Args:
        path (`Path`): YAML file.
        names (`Collection[str]`): names of the options, with underscores.
        flags (`Collection[str]`): names of the options that are true or false.
    """
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except OSError as error:
        raise InvalidParameterError(
            f"cannot read the settings in {path}: {error.strerror}. Pass a YAML file, as in --config run.yaml."
        ) from error
    except RecursionError as error:
        raise InvalidParameterError(f"{path} is nested too deeply. Pass settings, a line each.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidParameterError(f"{path} is not YAML: {error}") from error
    if not isinstance(data, dict):
        raise InvalidParameterError(f"{path} holds {type(data).__name__}. Pass settings, a line each, as 'factor: 8'.")
    settings = {}
    for key, value in data.items():
        flag = f"--{str(key).replace('_', '-')}"
        name = FORMER.get(flag, flag).removeprefix("--").replace("-", "_")
        if flag in FORMER:
            say(f"{key} in {path} is now called {name}", err=True)
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            guess = f"Did you mean {near[0]!r}? " if near else ""
            raise InvalidParameterError(
                f"Expected settings of the command in {path}, got {key!r}. {guess}Pass some of "
                f"{', '.join(sorted(names))}."
            )
        if value is not None:
            settings[name] = _as_text(path, name, value, name in flags)
    return settings


class _UniqueKeys(yaml.SafeLoader):
    """Loader of `yaml.safe_load` that refuses duplicate keys, of which `safe_load` takes the last.

    Numbers remain as they are typed: YAML reads 010 as 8, and 1:30 as 90.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


for _kind in ("int", "float"):
    _UniqueKeys.add_constructor(f"tag:yaml.org,2002:{_kind}", lambda loader, node: node.value)


def _as_text(path: Path, name: str, value: Any, is_flag: bool) -> str:
    items = value if isinstance(value, list) and name in LISTS else [value]
    for item in items:
        if isinstance(item, bool) != is_flag or not isinstance(item, str | bool):
            kind = "a list of plain values" if name in LISTS else "true or false" if is_flag else "one plain value"
            raise InvalidParameterError(f"{name} in {path} is {item!r}. Pass {kind}.")
    return ",".join(map(str, items))


Model = Annotated[str, typer.Option(help="Model folder, GGUF file or Hub id.")]
Start = Annotated[int, typer.Option(min=0, help="Tokens to skip at the beginning of each document.")]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16", "auto"],
    typer.Option(help="Dtype of the weights; auto: that of the checkpoint (GGUF: float32)."),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that MODEL's folder or repository contains.")
]
Device = Annotated[str, typer.Option(help="Device of torch: cpu, cuda:0, mps.")]
Seed = Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of everything random.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Resume = Annotated[bool, typer.Option("--resume", help="Resume the run whose journal is in OUTPUT, if any.")]
Config = Annotated[
    Path | None,
    typer.Option(callback=use_config, is_eager=True, help="YAML file of these settings; flags take precedence."),
]
TrainedLength = Annotated[
    int | None, typer.Option(min=1, help="Trained length in tokens, if the config is wrong or lacks it.")
]


def option(help: str, default: Any = None, **flag: Any) -> Any:
    """Declare the field of a dataclass as an option; `...` as its default makes it one that must be given.

    Args:
        help (`str`): text of the help.
        default (`Any`, *optional*): default value.
        flag: further arguments of `typer.Option`.
    """
    return field(default=MISSING if default is ... else default, metadata={"help": help, "flag": flag})


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Target of a method, as a factor or a length."""

    factor: float | None = option("Target length as a multiple of the trained length.")
    target_length: int | None = option("Target length in tokens, instead of a factor.", min=2)
    trained_length: TrainedLength = None


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Texts of a command."""

    dataset: str = option("Folder of .txt; .jsonl, .json, .csv, .parquet; recipe; Hub id.", ...)
    documents: int | None = option("Number of documents to read. Default: all.", min=1)
    text_column: str | None = option("Column of the texts. Default: text, or the recipe's.")
    split: str | None = option("Split of the data set.")
    revision: str | None = option("Branch, tag or commit of a Hub data set.")

    def load(self) -> Documents:
        """Return the documents."""
        from ..evaluation import load_documents

        names: Any = {"text_column": self.text_column, "split": self.split, "revision": self.revision}
        return load_documents(self.dataset, limit=self.documents, **names)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Model of a command."""

    model: Model


@dataclass(frozen=True, kw_only=True)
class Run(Texts, Subject):
    """A model that reads texts, in one process or in those of a launcher."""

    dtype: Dtype = "float32"
    device: str | None = option("Device of torch, such as cuda:0 or mps. Default: cpu, or the launcher's choice.")
    trust_remote_code: TrustRemoteCode = False


def derived(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command an option for each field of its dataclass parameters, and call it with the dataclasses.

    A field is typed like a parameter of typer, or its metadata contains `help` and, in `flag`, further arguments of
    `typer.Option`. `of` in `flag` names the only command that has the option.
    """
    parameters: list[inspect.Parameter] = []
    groups: dict[str, tuple[Any, dict[str, Any]]] = {}
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        if is_dataclass(cls := parameter.annotation):
            hints = get_type_hints(cls, include_extras=True)
            groups[name] = (
                cls,
                {
                    entry.name: hints[entry.name]
                    for entry in fields(cls)
                    if entry.metadata.get("flag", {}).get("of", command.__name__) == command.__name__
                },
            )
            parameters += [_option(entry, hints[entry.name]) for entry in fields(cls) if entry.name in groups[name][1]]
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
    if not groups:
        return command

    @functools.wraps(command)
    def call(**values: Any) -> Any:
        objects = {
            name: cls(**{field: _parsed(field, hint, values.pop(field)) for field, hint in hints.items()})
            for name, (cls, hints) in groups.items()
        }
        return command(**values, **objects)

    # Options that must be given come first, as in any signature; the order of the others is that of the help.
    parameters.sort(key=lambda parameter: parameter.default is not inspect.Parameter.empty)
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return call


def _option(entry: Any, hint: Any) -> inspect.Parameter:
    """Return the option of a field in the form of typer."""
    default = inspect.Parameter.empty if entry.default is MISSING else entry.default
    if "help" in entry.metadata:
        flag = {key: value for key, value in entry.metadata.get("flag", {}).items() if key != "of"}
        if "bounds" in entry.metadata:
            flag |= dict(zip(("min", "max"), entry.metadata["bounds"], strict=True))
        names = (f"--{entry.name.replace('_', '-')}",) if hint is bool else ()  # without a negative form
        if (kind := _items(hint)) is not None:
            flag = {"metavar": f"<{kind.__name__},...>", **flag}
        if kind is not None or hint is Any:
            hint = str if entry.default is MISSING else str | None
        hint = Annotated[hint, typer.Option(*names, help=entry.metadata["help"], **flag)]
    return inspect.Parameter(entry.name, inspect.Parameter.KEYWORD_ONLY, annotation=hint, default=default)


def _items(hint: Any) -> Any:
    """Return the type of the items of a sequence, even if it is optional; `None` for other hints."""
    for candidate in (hint, *get_args(hint)):
        if get_origin(candidate) is Sequence:
            return get_args(candidate)[0]
    return None


def _parsed(name: str, hint: Any, value: Any) -> Any:
    """Return the value of a field from the typed text."""
    kind = _items(hint)
    if kind is None or value is None:
        return value
    return [part.strip() for part in value.split(",") if part.strip()] if kind is str else numbers(value, name, kind)


def numbers(text: str, name: str = "lengths", kind: type[Number] = int) -> list[Number]:
    """Return the numbers of a text, which are separated by commas."""
    kinds, example = ("whole numbers", "512,1024") if kind is int else ("numbers", "0,0.5,1")
    try:
        return [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise InvalidParameterError(
            f"Expected {kinds} separated by commas, got {name}={text!r}. Pass --{name} {example}."
        ) from None


def methods_of(text: str | None) -> list[Method] | None:
    """Return the methods in a text, which are separated by commas; `None` for `None`."""
    if text is None:
        return None
    from ..methods import as_method
    from ..methods.text import split_outside_brackets

    methods = [as_method(name) for name in split_outside_brackets(text, ",") if name]
    if not methods:
        raise InvalidParameterError(
            f"Expected methods, got methods={text!r}. Pass at least one, as in --methods none,yarn."
        )
    return methods


def command_line(context: typer.Context) -> str:
    """Return the command that repeats a run: every setting that differs from its default, whatever its source."""
    from ..evaluation.reading import portable

    words = ["hf-posext", str(context.command.name)]
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        if parameter.name in NEVER or value is None or value == parameter.default:
            continue
        words += [parameter.opts[0]] if value is True else [parameter.opts[0], portable(str(value))]
    return shlex.join(words)
