"""Which blocks of a group hold which content, for requests that begin alike."""

from collections.abc import Iterable, Sequence


class PrefixCache:
    """Names (core/block_hashes.py) of device blocks, in use or free: a free one keeps its name until it is allocated.

    The first block of a name keeps it: one computed beside it, by sequences that ran at the same time, stays unnamed.
    """

    def __init__(self) -> None:
        self._blocks: dict[bytes, int] = {}
        self._names: dict[int, bytes] = {}

    def find(self, name: bytes) -> int | None:
        """The block of that name."""
        return self._blocks.get(name)

    def find_run(self, names: Sequence[bytes]) -> list[int]:
        """The blocks of the first names, as far as all are there."""
        found = list(map(self._blocks.get, names))
        return found[: found.index(None)] if None in found else found  # type: ignore[return-value]

    def name_of(self, block_id: int) -> bytes | None:
        return self._names.get(block_id)

    def names_of(self, block_ids: Iterable[int]) -> list[bytes | None]:
        return list(map(self._names.get, block_ids))

    def publish(self, name: bytes, block_id: int) -> None:
        """The block has all its tokens, or will before any later plan's step."""
        if name not in self._blocks and block_id not in self._names:
            self._blocks[name] = block_id
            self._names[block_id] = name

    def forget(self, block_id: int) -> bytes | None:
        """The block is to be written anew; its name, if it had one."""
        name = self._names.pop(block_id, None)
        if name is not None:
            del self._blocks[name]
        return name

    def check_invariants(self) -> None:
        assert {name: block_id for block_id, name in self._names.items()} == self._blocks
