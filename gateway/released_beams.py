"""Handles of beam searches that were cancelled and may still end in a message that is on its way.

Scores come one for each beam search's output in a message, in order, so who reads them must know which of the entries
that nobody waits for are such outputs. The engine does not say when it has heard of a cancel; so the latest handles are
kept, many more than can be in question.
"""

from collections.abc import Iterable

_MAX_HANDLES = 2**16


class ReleasedBeams:
    """The latest of them; of one session."""

    def __init__(self, max_handles: int = _MAX_HANDLES) -> None:
        self._max_handles = max_handles
        self._handles: dict[int, None] = {}  # oldest first

    def add(self, handles: Iterable[int]) -> None:
        self._handles.update(dict.fromkeys(handles))
        while len(self._handles) > self._max_handles:
            del self._handles[next(iter(self._handles))]

    def __contains__(self, handle: int) -> bool:
        return handle in self._handles

    def take(self, handle: int) -> bool:
        """Whether it is one; it ends now, and is forgotten."""
        if handle not in self._handles:
            return False
        del self._handles[handle]
        return True
