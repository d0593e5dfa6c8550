"""Token ids to text, piece by piece: never half a character, never text that later tokens would change.

A byte-level tokenizer (GPT-2, Llama 3, Qwen) gives each token fixed bytes, so an incremental UTF-8 decoder is exact and
costs constant time for a token. For other kinds (SentencePiece with byte fallback) the text is the difference of two
decodes over a short window.
"""

import codecs
from typing import Protocol

import tokenizers

_REPLACEMENT = "�"


class Detokenizer(Protocol):
    """Owner of one sequence's text."""

    def push(self, token_ids: list[int]) -> str:
        """The text that these tokens make certain."""

    def finish(self) -> str:
        """Certain text that was held back, at the end of the sequence. A character cut in half is left out."""


class ByteLevelVocabulary:
    """The bytes of each token of a byte-level tokenizer, looked up once."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, special: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._bytes: dict[int, bytes] = {}
        self._special = special
        self._latin1_of_character = _Latin1OfCharacter()

    def bytes_of(self, token_id: int, skip_special_tokens: bool) -> bytes:
        """What the token adds to the output; nothing for an id that the tokenizer does not know."""
        if skip_special_tokens and token_id in self._special:
            return b""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._look_up(token_id)
        return known

    def _look_up(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        if token is None:  # vocabularies are often padded beyond the tokenizer's
            return b""
        try:
            return token.translate(self._latin1_of_character).encode("latin-1")
        except UnicodeEncodeError:  # an added token, which is plain text
            return token.encode()


class _Latin1OfCharacter(dict[int, int]):
    """GPT-2's table, for str.translate: printable Latin-1 stands for itself, the other bytes for the characters from
    U+0100 on. What is not in it goes where Latin-1 has nothing."""

    def __init__(self) -> None:
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = sorted(set(range(0x100)).difference(printable))
        super().__init__(zip(printable, printable, strict=True))
        self.update((0x100 + index, byte) for index, byte in enumerate(others))

    def __missing__(self, character: int) -> int:
        return 0xFFFF


class ByteLevelDetokenizer:
    """Exact: bytes through an incremental UTF-8 decoder, malformed ones as U+FFFD, as tokenizers does."""

    def __init__(self, vocabulary: ByteLevelVocabulary, skip_special_tokens: bool) -> None:
        self._vocabulary = vocabulary
        self._skip = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_ids: list[int]) -> str:
        bytes_of, skip = self._vocabulary.bytes_of, self._skip
        return self._decoder.decode(b"".join([bytes_of(token_id, skip) for token_id in token_ids]))

    def finish(self) -> str:
        return ""


class WindowDetokenizer:
    """For any decoder: text is what a window of tokens decodes to beyond what its settled part does.

    The settled part stays in the window because a decoder may treat the first token of a text differently (it drops a
    leading space). Text that ends with U+FFFD may be the start of a character, so it waits; no character has more than
    four bytes, so after four such tokens it is malformed for good and goes out as it is.
    """

    _MAX_BYTES = 4

    def __init__(self, tokenizer: tokenizers.Tokenizer, special: frozenset[int], skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = special if skip_special_tokens else frozenset()
        self._window: list[int] = []
        self._num_settled = 0
        self._num_waiting = 0  # tokens since the last that ended in a whole character

    def push(self, token_ids: list[int]) -> str:
        return "".join([self._push_one(token_id) for token_id in token_ids if token_id not in self._skipped])

    def finish(self) -> str:
        return self._new_text().rstrip(_REPLACEMENT)

    def _push_one(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._new_text()
        if not text:  # such as the space that a decoder drops from the start
            return ""
        if text.endswith(_REPLACEMENT):
            self._num_waiting += 1
            if self._num_waiting < self._MAX_BYTES:
                return ""
        self._num_waiting = 0
        self._window = self._window[self._num_settled :]
        self._num_settled = len(self._window)
        return text

    def _new_text(self) -> str:
        settled = self._decode(self._window[: self._num_settled])
        text = self._decode(self._window)
        if text.startswith(settled):
            return text[len(settled) :]
        return self._decode(self._window[self._num_settled :])  # malformed bytes spoil the decode of those before them

    def _decode(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=False))
