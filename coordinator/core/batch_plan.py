"""What one step does: the value that the core decides, and the shell encodes for the workers."""

from dataclasses import dataclass, field
from typing import Any

from .sequence import Sequence
from .step_time import StepLoad
from .transfers import StepTransfers


@dataclass(frozen=True, slots=True)
class SlotJoin:
    """A sequence takes a slot, with all that a worker must know of it."""

    slot: int
    token_ids: bytes  # packed int32: prompt and output so far
    num_prompt_tokens: int
    num_computed_tokens: int
    block_ids: list[int]
    sampling: Any  # as the request carries it
    index: int  # of the sequence in its request: its seed is the request's plus this


@dataclass(frozen=True, slots=True)
class ScheduledRow:
    """One row of a step, as the coordinator remembers it until the result comes."""

    sequence: Sequence
    num_preemptions: int  # of the sequence, when the row was scheduled; a result for an earlier life is dropped
    num_tokens: int
    samples: bool

    @property
    def is_stale(self) -> bool:
        return self.sequence.slot < 0 or self.sequence.num_preemptions != self.num_preemptions


@dataclass(slots=True)
class BatchPlan:
    """Changes to the slot table and the rows of a step; see proto/worker.proto for the order in which they apply.

    `rows` are the decode rows in the order of `decode_slots`, then the chunk rows in the order of `chunk_slots`. A plan
    without rows carries transfers, or learns that they have ended.
    """

    step_id: int
    leave_slots: list[int] = field(default_factory=list)
    joins: list[SlotJoin] = field(default_factory=list)
    append_slots: list[int] = field(default_factory=list)
    append_block_ids: list[int] = field(default_factory=list)
    amends: dict[int, int] = field(default_factory=dict)  # slot: its newest token
    copies: list[tuple[int, int]] = field(default_factory=list)  # from block, to block
    transfers: StepTransfers = field(default_factory=StepTransfers)
    finished_transfers: int = 0  # the last step whose transfers are known to have ended
    decode_slots: list[int] = field(default_factory=list)
    decode_slots_changed: bool = False
    chunk_slots: list[int] = field(default_factory=list)
    chunk_num_tokens: list[int] = field(default_factory=list)
    num_attended_tokens: int = 0  # before each of the chunks' tokens in its sequence, together
    num_context_tokens: int = 0  # before each of the chunks, together
    rows: list[ScheduledRow] = field(default_factory=list)

    @property
    def num_samples(self) -> int:
        """Tokens that the result will have: one for each decode row, and for each chunk that is its sequence's last."""
        num_decodes = len(self.decode_slots)
        return num_decodes + sum(row.samples for row in self.rows[num_decodes:])

    @property
    def num_joined_tokens(self) -> int:
        """Known tokens of the sequences that join."""
        return sum(len(join.token_ids) for join in self.joins) // 4

    @property
    def num_tokens(self) -> int:
        return len(self.decode_slots) + sum(self.chunk_num_tokens)

    @property
    def load(self) -> StepLoad:
        """What its duration hangs on."""
        num_decodes, num_chunk_tokens = len(self.decode_slots), sum(self.chunk_num_tokens)
        return StepLoad(num_decodes, num_chunk_tokens, self.num_attended_tokens, self.num_context_tokens)
