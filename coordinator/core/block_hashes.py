"""Names of block contents: a chain of hashes over a sequence's tokens.

The KV of a token depends on all tokens before it, so the name of a full block covers the block's tokens and the name of
the block in front. Two blocks of one name hold the same KV, whoever computed it: names are 16 bytes of a cryptographic
hash, so no request can be made to meet another's block by chance or by intent.
"""

from array import array
from hashlib import blake2b

_NAME_BYTES = 16


class BlockHashes:
    """Names of one sequence's full blocks, made when they are first asked for and kept."""

    __slots__ = ("_names", "_root", "_size_bytes", "block_size")

    def __init__(self, salt: bytes, block_size: int) -> None:
        """Sequences of other salts have other names throughout."""
        self.block_size = block_size
        self._size_bytes = block_size * array("i").itemsize
        self._root = blake2b(salt, digest_size=_NAME_BYTES, person=b"root").digest()  # unlike any block's
        self._names: list[bytes] = []

    def first(self, num_blocks: int, token_ids: "array[int]") -> list[bytes]:
        """Names of the first `num_blocks` blocks, all full; `token_ids` of the sequence, which only ever grows."""
        names = self._names
        if len(names) < num_blocks:
            content = memoryview(token_ids).cast("B")
            name = names[-1] if names else self._root
            for start in range(len(names) * self._size_bytes, num_blocks * self._size_bytes, self._size_bytes):
                name = blake2b(name + content[start : start + self._size_bytes], digest_size=_NAME_BYTES).digest()
                names.append(name)
        return names if len(names) == num_blocks else names[:num_blocks]

    def fork(self) -> "BlockHashes":
        """For a sequence that shares this one's tokens so far, all of whose named blocks it has too."""
        forked = BlockHashes.__new__(BlockHashes)
        forked.block_size, forked._size_bytes, forked._root = self.block_size, self._size_bytes, self._root
        forked._names = list(self._names)
        return forked
