"""Renders a conversation with the model's own chat template, as transformers' apply_chat_template does.

Templates are Jinja of unknown origin, so they run in Jinja's immutable sandbox and see nothing but strings, lists and
dicts. transformers itself is not imported: it costs seconds and loads torch.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..errors import FailedPreconditionError, InvalidArgumentError

Message = Mapping[str, str]  # "role" and "content"


class _Refusal(jinja2.TemplateError):
    """What a template raises on purpose; its text is written for the caller."""


class _GenerationTag(jinja2.ext.Extension):
    """The {% generation %} block marks assistant text for training; when serving it is only its content."""

    tags = {"generation"}  # noqa: RUF012 - the attribute's form is Jinja's

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise _Refusal(message)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(format_string: str) -> str:
    return datetime.datetime.now().strftime(format_string)


def _environment() -> ImmutableSandboxedEnvironment:
    extensions: list[Any] = [_GenerationTag, jinja2.ext.loopcontrols]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class ChatTemplate:
    """One compiled template with the special tokens that it may name."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Raises FailedPreconditionError for a template that is no valid Jinja."""
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise FailedPreconditionError(f"the model's chat template is not valid: {error}") from error
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The prompt text. Raises InvalidArgumentError naming `messages` for a conversation the template refuses."""
        variables = {**self._special_tokens, "tools": None, "documents": None}
        plain = [dict(message) for message in messages]
        try:
            return self._template.render(messages=plain, add_generation_prompt=add_generation_prompt, **variables)
        except _Refusal as refusal:
            raise InvalidArgumentError(f"messages: the model's chat template says: {refusal}", "messages") from refusal
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            message = "messages: the model's chat template cannot render this conversation"
            raise InvalidArgumentError(message, "messages") from error


def load_chat_template(directory: Path, tokenizer_config: Mapping[str, Any]) -> ChatTemplate | None:
    """The template of a model directory: chat_template.jinja, else tokenizer_config.json's; None if there is none."""
    path = directory / "chat_template.jinja"
    source = path.read_text() if path.is_file() else tokenizer_config.get("chat_template")
    if isinstance(source, list):  # several named ones
        source = next((entry["template"] for entry in source if entry["name"] == "default"), None)
    return ChatTemplate(source, _special_tokens(tokenizer_config)) if source is not None else None


def _special_tokens(tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    tokens = {}
    for name, value in tokenizer_config.items():
        content = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(content, str):
            tokens[name] = content
    return tokens
