"""When a group that failed is rebuilt, and when it is given up. Pure: the clock comes in."""

from collections import deque

WINDOW_S = 600.0
_LONG_LIFE_S = 10.0  # a group that served for so long does not keep dying
_FIRST_DELAY_S = 0.5
_MAX_DELAY_S = 30.0


class RestartPolicy:
    """Remembers the failures of one group, and of the attempts to rebuild it."""

    def __init__(self, max_restarts: int) -> None:
        """`max_restarts` within WINDOW_S."""
        self._max_restarts = max_restarts
        self._failed_at: deque[float] = deque()
        self._served_from: float | None = None  # None: the last attempt failed
        self._num_short_lives = -1  # one after another; the first failure of all is forgiven

    @property
    def num_failures(self) -> int:
        """Within the window, when the last one came."""
        return len(self._failed_at)

    def serves(self, now: float) -> None:
        """It was rebuilt."""
        self._served_from = now

    def forgive(self) -> None:
        """What the failures so far came from is gone. Delays stay: who sends such requests may send more."""
        self._failed_at.clear()

    def delay_s(self, now: float) -> float | None:
        """It has failed now. How long to wait before it is rebuilt; None: it is given up.

        At once after a long life, and twice as long each time that it dies young.
        """
        self._failed_at.append(now)
        while self._failed_at[0] < now - WINDOW_S:
            self._failed_at.popleft()
        if self.num_failures > self._max_restarts:
            return None
        has_lived_long = self._served_from is not None and now - self._served_from > _LONG_LIFE_S
        self._num_short_lives = 0 if has_lived_long else self._num_short_lives + 1
        self._served_from = None
        if self._num_short_lives == 0:
            return 0.0
        return float(min(_FIRST_DELAY_S * 2 ** (self._num_short_lives - 1), _MAX_DELAY_S))
