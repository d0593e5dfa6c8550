"""Which decodes of a step begin with the same blocks, so that attention may read these once for all of them.

Block tables say it exactly: sequences that begin alike hold the same blocks, whether they found them in the prefix
cache or are samples of one prompt.
"""

import numpy as np
from numpy.typing import NDArray

from ..kernels.batch import SharedPrefix
from .plan import Ints
from .slot_table import SlotTable
from .step_batch import StepRows

# Bytes of keys and values of a layer that must not be read again, so that a step gains more than it loses to a launch
# and to running without one graph for the whole of it.
_MIN_SAVED_BYTES = 256 * 2**20
_MIN_ROWS = 8
_MIN_KEYS = 128  # of a prefix


class PrefixGroups:
    """Finds the prefixes that steps share, anew whenever other sequences decode."""

    def __init__(self, slots: SlotTable, bytes_per_key: int) -> None:
        """bytes_per_key: of a token's key and value in one layer of this rank."""
        self._slots = slots
        self._min_saved_keys = -(-_MIN_SAVED_BYTES // bytes_per_key)
        self._found: tuple[SharedPrefix, ...] = ()
        self._found_for: tuple[int, bytes] | None = None

    def keys_worth_sharing(self, num_rows: int) -> int | None:
        """The length from which on a prefix of so many decodes is read once; None if none is."""
        if num_rows < _MIN_ROWS:
            return None
        return max(_MIN_KEYS, -(-self._min_saved_keys // (num_rows - 1)))

    def of(self, rows: StepRows) -> tuple[SharedPrefix, ...]:
        """The prefixes that the step's decodes had better read once; none if that saves too little."""
        slots = rows.slots[: rows.num_decodes]
        if len(slots) < _MIN_ROWS:
            return ()
        found_for = self._slots.version, slots.tobytes()
        if self._found_for != found_for:
            # What a row computes goes behind its prefix: into a block that is its own.
            num_full = (rows.seq_lens[: rows.num_decodes] - 1) // self._slots.shape.block_size
            self._found, self._found_for = self._find(slots, num_full), found_for
        return self._found

    def _find(self, slots: Ints, num_full: Ints) -> tuple[SharedPrefix, ...]:
        block_size = self._slots.shape.block_size
        rows, num_full = _rows_that_may_share(self._slots.host_block_tables[slots, 0], num_full)
        # More than this no groups of them can save.
        if int(num_full.sum() - num_full.max(initial=0)) * block_size < self._min_saved_keys:
            return ()
        tables = self._slots.host_block_tables[slots[rows], : int(num_full.max())]
        found = [
            SharedPrefix(tuple(rows[members].tolist()), int(slots[rows[members[0]]]), num_blocks * block_size)
            for members, num_blocks in shared_prefixes(tables, num_full)
            if num_blocks * block_size >= _MIN_KEYS
        ]
        return tuple(found) if sum(prefix.num_saved_keys for prefix in found) >= self._min_saved_keys else ()


def shared_prefixes(tables: NDArray[np.int64], num_blocks: Ints) -> list[tuple[Ints, int]]:
    """Groups of rows, and how many blocks each has in common at the start, that save many reads of a block.

    tables: [num_rows, max_blocks], of which row i counts as far as num_blocks[i]. A row is in one group at most; of
    those in none, no two begin alike.
    """
    groups: list[tuple[Ints, int]] = []
    rows = np.arange(len(tables))
    while len(found := _runs_in_common(tables[rows], num_blocks[rows])):
        groups += [(rows[members], length) for members, length in found]
        rows = np.delete(rows, np.concatenate([members for members, _ in found]))
    return groups


def _runs_in_common(tables: NDArray[np.int64], num_blocks: Ints) -> list[tuple[Ints, int]]:
    """In the order of the tables rows that begin alike lie side by side, and groups are runs of them: runs are joined
    from the longest common start to the shortest, and one is one group if that saves as much as the groups in it do."""
    order = _sorted_rows(tables)
    common = _common_starts(tables[order], num_blocks[order])
    runs = {row: _Run(row, row + 1, 0, ()) for row in range(len(tables))}  # by their first row, and by their last one
    for left in np.argsort(-common, kind="stable").tolist():
        if not common[left]:
            break
        run = runs[left].joined(runs[left + 1], int(common[left]))
        runs[run.start] = runs[run.end - 1] = run
    groups: list[tuple[Ints, int]] = []
    row = 0
    while row < len(tables):
        run = runs[row]
        groups += [(np.sort(order[start:end]), length) for start, end, length in run.groups]
        row = run.end
    return groups


def _sorted_rows(tables: NDArray[np.int64]) -> Ints:
    """As bytes, which compare at once however long rows are."""
    keys = [row.tobytes() for row in tables.astype(">i4")]
    return np.array(sorted(range(len(keys)), key=keys.__getitem__), dtype=np.int64)


class _Run:
    """Rows side by side, and the groups in it that save the most."""

    __slots__ = ("end", "groups", "num_saved", "start")

    def __init__(self, start: int, end: int, num_saved: int, groups: tuple[tuple[int, int, int], ...]) -> None:
        self.start, self.end, self.num_saved, self.groups = start, end, num_saved, groups

    def joined(self, right: "_Run", common: int) -> "_Run":
        """With the run behind it, with which all its rows have `common` blocks in common."""
        as_one = (right.end - self.start - 1) * common
        apart = self.num_saved + right.num_saved
        if as_one >= apart:
            return _Run(self.start, right.end, as_one, ((self.start, right.end, common),))
        return _Run(self.start, right.end, apart, self.groups + right.groups)


def _common_starts(tables: NDArray[np.int64], num_blocks: Ints) -> Ints:
    """[num_rows - 1]: blocks that each row has in common with the next."""
    if not tables.size:
        return np.zeros(max(0, len(tables) - 1), dtype=np.int64)
    differs = tables[1:] != tables[:-1]
    first = np.where(differs.any(1), differs.argmax(1), tables.shape[1])
    common: Ints = np.minimum(first, np.minimum(num_blocks[1:], num_blocks[:-1]))
    return common


def _rows_that_may_share(first_blocks: Ints, num_blocks: Ints) -> tuple[Ints, Ints]:
    """Those whose first block another row has too, and how far each counts: no two share more than the second longest
    has."""
    _, inverse, counts = np.unique(first_blocks, return_inverse=True, return_counts=True)
    (rows,) = np.nonzero(counts[inverse] > 1)
    lengths = num_blocks[rows]
    if len(rows):
        lengths = np.minimum(lengths, np.partition(lengths, -2)[-2])
    return rows, lengths
