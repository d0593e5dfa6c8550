"""A YAML file of options: `octavo serve --config FILE.yaml`. Keys are the options' names, with - or _."""

from collections.abc import Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from ..errors import InvalidArgumentError, NotFoundError
from .config import ServeConfig


def read_config_file(path: Path) -> dict[str, Any]:
    """The file's options, checked for name and type.

    Raises NotFoundError without the file, InvalidArgumentError naming the key that is unknown or of a wrong type.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise NotFoundError(f"cannot read the configuration file {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(f"{path} is not YAML: {_one_line(error)}") from error
    if content is None:
        return {}
    if not isinstance(content, Mapping):
        raise InvalidArgumentError(f"{path} must hold options, one `name: value` a line")
    return _check_options(path, content)


def _check_options(path: Path, content: Mapping[Any, Any]) -> dict[str, Any]:
    types = get_type_hints(ServeConfig)
    options: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in types:
            raise InvalidArgumentError(f"{path}: unknown option {key!r}; `octavo serve --help` lists them", str(key))
        if name in options:
            raise InvalidArgumentError(f"{path}: option {name!r} is there twice", name)
        options[name] = check_type(f"{path}: {key}", name, value, types[name])
    return options


def check_type(shown: str, name: str, value: Any, expected: Any) -> Any:  # noqa: ANN401 (a value of any option)
    """`value` as the option's type. Raises InvalidArgumentError, with `shown` before the reason, for another type."""
    if expected == tuple[str, ...]:
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list | tuple) or not all(isinstance(item, str) for item in values):
            raise InvalidArgumentError(f"{shown} must be a string or a list of strings, got {value!r}", name)
        return tuple(values)
    if not _matches(value, expected):
        raise InvalidArgumentError(f"{shown} must be {_describe(expected)}, got {value!r}", name)
    return value


def _matches(value: Any, expected: Any) -> bool:  # noqa: ANN401
    if isinstance(expected, UnionType):
        return any(_matches(value, member) for member in get_args(expected))
    if get_origin(expected) is Literal:
        return value in get_args(expected)
    if isinstance(value, bool):  # a bool is an int to Python, not to a reader of the file
        return expected is bool
    return isinstance(value, int | float if expected is float else expected)


def _describe(expected: Any) -> str:  # noqa: ANN401
    if isinstance(expected, UnionType):
        return " or ".join(_describe(member) for member in get_args(expected))
    if get_origin(expected) is Literal:
        return "one of " + ", ".join(get_args(expected))
    return {int: "an integer", float: "a number", bool: "true or false", str: "a string", NoneType: "null"}[expected]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
