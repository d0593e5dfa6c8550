"""When the number of worker groups follows the load by itself. Pure: the clock and what is seen come in."""

from dataclasses import dataclass

_UP_AFTER_S = 5.0  # in which requests waited whenever it was looked
_DOWN_AFTER_S = 60.0
_DOWN_SHARE = 0.5  # of what one group fewer has, that the load would take
_PAUSE_S = 60.0  # after a change that was refused or failed


@dataclass(frozen=True, slots=True)
class Load:
    """What is seen of the groups that serve, and of the queue."""

    num_groups: int
    num_waiting: int
    num_running: int  # sequences, in all groups
    max_num_seqs: int  # of each group
    num_used_blocks: int  # in all groups
    num_blocks: int  # likewise


class AutoscalePolicy:
    """Up by one when requests have waited without a break, down by one when the load has been light for long."""

    def __init__(self, least: int, most: int) -> None:
        self._least, self._most = least, most
        self._waits_since: float | None = None
        self._light_since: float | None = None
        self._not_before = float("-inf")

    def decide(self, load: Load, now: float) -> int | None:
        """How many groups there should be, if not as many as there are."""
        self._waits_since = _since(self._waits_since, load.num_waiting > 0, now)
        self._light_since = _since(self._light_since, self._is_light(load), now)
        if now < self._not_before:
            return None
        if _has_lasted(self._waits_since, _UP_AFTER_S, now) and load.num_groups < self._most:
            return load.num_groups + 1
        if _has_lasted(self._light_since, _DOWN_AFTER_S, now) and load.num_groups > self._least:
            return load.num_groups - 1
        return None

    def note_change(self) -> None:
        """The load is judged anew."""
        self._waits_since = self._light_since = None

    def note_failure(self, now: float) -> None:
        """The change was refused, or failed: it is not tried again at once."""
        self.note_change()
        self._not_before = now + _PAUSE_S

    @staticmethod
    def _is_light(load: Load) -> bool:
        """Whether one group fewer would be at most half full, in slots and in blocks."""
        rest = load.num_groups - 1
        if load.num_waiting or rest < 1:
            return False
        num_blocks = load.num_blocks * rest / load.num_groups
        fits_slots = load.num_running <= _DOWN_SHARE * rest * load.max_num_seqs
        return fits_slots and load.num_used_blocks <= _DOWN_SHARE * num_blocks


def _since(since: float | None, holds: bool, now: float) -> float | None:
    """From when on something that may hold now has held."""
    if not holds:
        return None
    return now if since is None else since


def _has_lasted(since: float | None, duration_s: float, now: float) -> bool:
    return since is not None and now - since >= duration_s
