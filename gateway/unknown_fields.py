"""Refuses what a newer client may ask for: protobuf keeps fields that this server does not know, and says nothing."""

from collections.abc import Iterator

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from ..errors import InvalidArgumentError


def refuse_unknown_fields(message: Message, path: str = "") -> None:
    """Raises InvalidArgumentError naming the first unknown field by number, in `message` or one inside it."""
    unknown = UnknownFieldSet(message)
    if len(unknown):
        field = f"{path}{unknown[0].field_number}"
        raise InvalidArgumentError(f"{field}: {message.DESCRIPTOR.full_name} has no field of this number here", field)
    for inner_path, inner in _inner_messages(message, path):
        refuse_unknown_fields(inner, inner_path)


def _inner_messages(message: Message, path: str) -> Iterator[tuple[str, Message]]:
    for descriptor, value in message.ListFields():
        if descriptor.message_type is None or descriptor.message_type.GetOptions().map_entry:
            continue
        if isinstance(value, Message):
            yield f"{path}{descriptor.name}.", value
        else:
            for index, item in enumerate(value):
                yield f"{path}{descriptor.name}[{index}].", item
