"""Checks that the HTTP endpoints share."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ..errors import InvalidArgumentError
from .openai_models import GenerationBody


@contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Errors of the block name a field as this endpoint calls it."""
    try:
        yield
    except InvalidArgumentError as error:
        public = names.get(error.field or "")
        if public is None or error.field is None:
            raise
        raise InvalidArgumentError(str(error).replace(error.field, public, 1), public) from error


def check_stream_options(body: GenerationBody) -> None:
    if body.stream_options is not None and not body.stream:
        raise InvalidArgumentError("stream_options needs stream to be true", "stream_options")
