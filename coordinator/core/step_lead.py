"""How long before the end of a step the next one is planned.

Early, and a prompt that comes meanwhile waits for a step that was planned without it; late, and the workers wait. So it
is planned as late as it still arrives in time, going by how long the step should take. How long it is on its way is
learned: whenever the workers had to wait, the next ones are sent earlier.
"""

# Planning, encoding, gRPC, launching, where all goes well. A prompt waits the less the later a step is planned: of 4
# requests a second (8B on an H100) the first tokens came after 24.6 ms with 1.2, and after 27.9 with 2.0. Some 5 % of
# the steps come late with either: the lead grows until it is no more.
_LEAST_MS = 1.2
_MOST_MS = 24.0
# Steps may end this share earlier than those like them did.
_UNCERTAIN = 0.1
_NOTICEABLE_IDLE_MS = 0.3  # copies to the device that begin a step are a third of it
_GROWTH = 1.5
_DECAY = 0.98


class StepLead:
    """Owner of the lead of one group's steps."""

    __slots__ = ("_lead_ms",)

    def __init__(self) -> None:
        self._lead_ms = _LEAST_MS

    def hold_ms(self, expected_ms: float) -> float:
        """From the start of a step that should take `expected_ms`, how long planning the next one can wait."""
        return max(0.0, (1 - _UNCERTAIN) * expected_ms - self._lead_ms)

    def observe(self, idle_ms: float) -> None:
        """The workers had to wait so long for a step that was planned late."""
        change = _GROWTH if idle_ms > _NOTICEABLE_IDLE_MS else _DECAY
        self._lead_ms = min(max(self._lead_ms * change, _LEAST_MS), _MOST_MS)
