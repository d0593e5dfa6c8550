"""How long a step of a group may take before the group counts as hung. Pure: durations come in, bounds go out.

Only what hangs for good is to be found: a rank that died ends its stream, and one that is stopped answers no ping. So a
bound is many times what steps of the size have taken, and far more for a size that has not been seen.
"""

from collections import deque

_FACTOR = 20.0  # times the slowest recent step of the size
_UNSEEN_FACTOR = 60.0  # times the least bound, for a size without a step yet: libraries load and compile late
_NUM_RECENT = 32  # steps of a size


class StepDeadlines:
    """Remembers the recent steps of one group, whatever its epoch, by size: powers of two of their tokens."""

    def __init__(self, least_s: float) -> None:
        """`least_s`: no step is late before; 0: none ever is."""
        self.least_s = least_s
        self._recent: dict[int, deque[float]] = {}

    def observe(self, num_tokens: int, duration_s: float) -> None:
        """A step has ended."""
        self._recent.setdefault(num_tokens.bit_length(), deque(maxlen=_NUM_RECENT)).append(duration_s)

    def allowed_s(self, num_tokens: int) -> float:
        """For a step of so many tokens; 0: for ever."""
        if not self.least_s:
            return 0.0
        if recent := self._recent.get(num_tokens.bit_length()):
            return max(self.least_s, _FACTOR * max(recent))
        slowest_s = max((max(recent) for recent in self._recent.values()), default=0.0)
        return max(_UNSEEN_FACTOR * self.least_s, _FACTOR * slowest_s)
