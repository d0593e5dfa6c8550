"""What a client of a served system notes of one request."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

Clock = Callable[[], float]  # seconds since the run began


@dataclass(slots=True)
class Observation:
    """Filled while the request runs. Times in seconds of the run's clock."""

    sent_at_s: float
    event_times_s: list[float] = field(default_factory=list)  # of each event that brought tokens
    num_tokens: int = 0  # as the server counts them
    finished_at_s: float = 0.0
    error: str | None = None

    @property
    def is_streamed(self) -> bool:
        """Whether its tokens came one after another. A server without a tokenizer has no text to stream over HTTP."""
        return len(self.event_times_s) > 1 or (bool(self.event_times_s) and self.num_tokens == 1)

    @property
    def ttft_s(self) -> float:
        """Time to first token. Only for a request that got one."""
        return self.event_times_s[0] - self.sent_at_s

    @property
    def gaps_s(self) -> list[float]:
        """Inter-token latencies: from one event to the next. An event may bring several tokens, if the client lags."""
        return [after - before for before, after in pairwise(self.event_times_s)]


def num_failed(observations: Sequence[Observation]) -> int:
    return sum(observation.error is not None for observation in observations)
