"""Names of block contents: hashes over a sequence's tokens, from its first to the block's last.

The KV of a token depends on all tokens before it, and so does the name. Two blocks of one name hold the same KV,
whoever computed it: names are 16 bytes of a cryptographic hash, so no request can be made to meet another's block by
chance or by intent.
"""

from array import array
from hashlib import sha256

_NAME_BYTES = 16


class BlockHashes:
    """Names of one sequence's full blocks, made when they are first asked for and kept."""

    __slots__ = ("_names", "_state", "block_size")

    def __init__(self, salt: bytes, block_size: int) -> None:
        """Sequences of other salts have other names throughout."""
        self.block_size = block_size
        self._state = sha256(sha256(salt).digest())  # of the salt, in as many bytes for each, and all named tokens
        self._names: list[bytes] = []

    def first(self, num_blocks: int, token_ids: "array[int]") -> list[bytes]:
        """Names of the first `num_blocks` blocks, all full; `token_ids` of the sequence, which only ever grows."""
        names = self._names
        if len(names) < num_blocks:
            content = token_ids[len(names) * self.block_size : num_blocks * self.block_size].tobytes()
            size_bytes, update, digest = self.block_size * token_ids.itemsize, self._state.update, self._state.digest
            for start in range(0, len(content), size_bytes):
                update(content[start : start + size_bytes])
                names.append(digest()[:_NAME_BYTES])
        return names if len(names) == num_blocks else names[:num_blocks]

    def fork(self) -> "BlockHashes":
        """For a sequence that shares this one's tokens so far, all of whose named blocks it has too."""
        forked = BlockHashes.__new__(BlockHashes)
        forked.block_size, forked._state, forked._names = self.block_size, self._state.copy(), list(self._names)
        return forked
