"""Settings of a run from a YAML file. Flags on the command line take precedence."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import typer
import yaml

from ..errors import InvalidParameterError

LISTS = ("methods", "lengths", "tasks", "depths", "targets")
"""Settings that contain several values: a YAML list, or text with commas as on the command line."""

NEVER = ("config", "resume")
"""Options of a single call, which are not settings of a run."""


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


def read_config(path: str | Path, known: Collection[str], flags: Collection[str] = ()) -> dict[str, str]:
    """Return the settings in a YAML file, as text by option name. An empty value leaves the default.

    Args:
        path (`str` or `Path`): YAML file.
        known (`Collection[str]`): names of the options, with underscores.
        flags (`Collection[str]`, *optional*): names of the options that are true or false.

    Raises:
        InvalidParameterError: the file cannot be read, is not YAML, or does not contain a mapping, a name is unknown
            or duplicate, or a value has a wrong type.
    """
    try:
        data = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_UniqueKeys)
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
        name = str(key).replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            guess = f"did you mean {near[0]!r}? " if near else ""
            raise InvalidParameterError(
                f"unknown setting {key!r} in {path}; {guess}there are: {', '.join(sorted(known))}"
            )
        if value is not None:
            settings[name] = _as_text(path, name, value, name in flags)
    return settings


class _UniqueKeys(yaml.SafeLoader):
    """Loader of `yaml.safe_load` that refuses duplicate keys, of which `safe_load` takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _as_text(path: str | Path, name: str, value: Any, is_flag: bool) -> str:
    items = value if isinstance(value, list) and name in LISTS else [value]
    for item in items:
        if isinstance(item, bool) != is_flag or not isinstance(item, str | int | float):
            kind = "a list of plain values" if name in LISTS else "true or false" if is_flag else "one plain value"
            raise InvalidParameterError(f"{name} in {path} is {item!r}. Pass {kind}.")
    return ",".join(map(str, items))
