"""Copies between device and host that are on their way. They run beside the steps and are done some steps later."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(slots=True)
class StepTransfers:
    """What one plan asks for: saves first, then loads. Of each: content's name, device block, host block."""

    saves: list[tuple[bytes, int, int]] = field(default_factory=list)
    loads: list[tuple[bytes, int, int]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.saves) + len(self.loads)


class Transfers:
    """Sent transfers of a group by the step that carried them, in order."""

    def __init__(self) -> None:
        self.finished_step = 0  # the last step whose transfers, and all before, have ended
        self._sent: deque[tuple[int, StepTransfers]] = deque()

    @property
    def num_blocks(self) -> int:
        """On their way."""
        return sum(len(transfers) for _, transfers in self._sent)

    @property
    def last_step(self) -> int:
        """The last step that carried a transfer that has not ended; 0 if all have."""
        return self._sent[-1][0] if self._sent else 0

    def pending(self) -> Iterable[tuple[int, StepTransfers]]:
        """Those on their way, with the step that carried them."""
        return self._sent

    def send(self, step_id: int, transfers: StepTransfers) -> None:
        if len(transfers):
            self._sent.append((step_id, transfers))

    def finish(self, step_id: int) -> list[StepTransfers]:
        """The workers say that the transfers of `step_id` and all before have ended; those that were not known to."""
        self.finished_step = max(self.finished_step, step_id)
        ended = []
        while self._sent and self._sent[0][0] <= self.finished_step:
            ended.append(self._sent.popleft()[1])
        return ended
