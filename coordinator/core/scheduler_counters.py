"""What the scheduler counts."""

from dataclasses import dataclass


@dataclass(slots=True)
class SchedulerCounters:
    """Totals since the start."""

    num_requests: int = 0
    num_finished: int = 0
    num_cancelled: int = 0
    num_failed: int = 0  # accepted ones, of which an output could not be served
    num_preemptions: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
