"""What bounds scheduling."""

from dataclasses import dataclass

from ...errors import InvalidArgumentError


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Bounds of scheduling; the same for each group."""

    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    max_num_waiting: int
    num_inflight_steps: int = 2
    itl_target_ms: float = 0.0  # for which a step that decodes takes smaller chunks; 0: none
    copies_blocks: bool = False  # somebody copies blocks from group to group, as the scheduler wants it

    def __post_init__(self) -> None:
        # A budget below the slots could be eaten by decodes alone, and prompts would starve.
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise InvalidArgumentError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least "
                f"max_num_seqs ({self.max_num_seqs})",
                field="max_num_batched_tokens",
            )
