"""When a group that failed is rebuilt, and when it is given up. Pure: the clock comes in."""

from collections import deque

WINDOW_S = 600.0
_FIRST_DELAY_S = 0.5  # before the second attempt; the first is made at once
_MAX_DELAY_S = 30.0


class RestartPolicy:
    """Remembers the failures of one group, and of the attempts to rebuild it."""

    def __init__(self, max_restarts: int) -> None:
        """`max_restarts` within WINDOW_S."""
        self._max_restarts = max_restarts
        self._failed_at: deque[float] = deque()

    @property
    def num_failures(self) -> int:
        """Within the window, when the last one came."""
        return len(self._failed_at)

    def delay_s(self, now: float) -> float | None:
        """It has failed now. How long to wait before it is rebuilt, twice as long each time; None: it is given up."""
        self._failed_at.append(now)
        while self._failed_at[0] < now - WINDOW_S:
            self._failed_at.popleft()
        if self.num_failures > self._max_restarts:
            return None
        if self.num_failures == 1:
            return 0.0
        return float(min(_FIRST_DELAY_S * 2 ** (self.num_failures - 2), _MAX_DELAY_S))
