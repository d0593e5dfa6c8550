"""The model's text side: tokenizer, chat template, detokenizers. Loaded once for a gateway process."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson
import tokenizers

from ..errors import FailedPreconditionError, InvalidArgumentError, NotFoundError
from .chat_template import ChatTemplate, Message, load_chat_template
from .detokenizer import ByteLevelDetokenizer, ByteLevelVocabulary, Detokenizer, WindowDetokenizer

_LONG_TEXT = 4096  # characters; longer texts are tokenized in a thread, so that other requests go on


class TextModel:
    """Tokenizer and chat template of one model."""

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, is_byte_level: bool, chat_template: ChatTemplate | None
    ) -> None:
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._special = frozenset(i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special)
        self._bytes = ByteLevelVocabulary(tokenizer, self._special) if is_byte_level else None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        # The batch call of the library lets other threads run meanwhile, and this one skips offsets that nobody reads.
        return list(self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)

    async def encode_async(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """As encode, but a long text does not stop the event loop."""
        if len(text) <= _LONG_TEXT:
            return self.encode(text, add_special_tokens)
        return await asyncio.to_thread(self.encode, text, add_special_tokens)

    async def encode_chat(
        self, messages: Sequence[Message], add_generation_prompt: bool, add_special_tokens: bool
    ) -> list[int]:
        """The conversation through the chat template, which writes special tokens itself; the tokenizer may add some.

        Raises: InvalidArgumentError naming `messages` if there is no template or it refuses them.
        """
        if self._chat_template is None:
            raise InvalidArgumentError("messages: this model has no chat template; send a plain prompt", "messages")
        rendered = self._chat_template.render(messages, add_generation_prompt)
        return await self.encode_async(rendered, add_special_tokens)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens))

    def token_text(self, token_id: int) -> str:
        """The token's own text; U+FFFD stands for part of a character."""
        return self.token_bytes(token_id).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        if self._bytes is not None:
            return self._bytes.bytes_of(token_id, skip_special_tokens=False)
        return self.decode([token_id]).encode()

    def token_name(self, token_id: int) -> str:
        """The token as the tokenizer's vocabulary writes it; empty for an id that it does not know."""
        return self._tokenizer.id_to_token(token_id) or ""

    def new_detokenizer(self, skip_special_tokens: bool) -> Detokenizer:
        if self._bytes is not None:
            return ByteLevelDetokenizer(self._bytes, skip_special_tokens)
        return WindowDetokenizer(self._tokenizer, self._special, skip_special_tokens)


def load_text_model(directory: Path) -> TextModel:
    """Reads tokenizer.json, tokenizer_config.json and the chat template.

    Raises: NotFoundError without tokenizer.json; FailedPreconditionError for a file that cannot be used.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise NotFoundError(f"{path} does not exist: save the tokenizer as tokenizer.json, or serve token ids only")
    content = path.read_bytes()
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises plain Exception
        raise FailedPreconditionError(f"{path} is no tokenizer that the tokenizers library reads: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    decoder = orjson.loads(content).get("decoder") or {}
    template = load_chat_template(directory, _read_json(directory / "tokenizer_config.json"))
    return TextModel(tokenizer, decoder.get("type") == "ByteLevel", template)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise FailedPreconditionError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise FailedPreconditionError(f"{path} is no JSON object")
    return content
