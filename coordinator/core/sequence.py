"""Requests and sequences: what is known of them, and the transitions that may change it."""

from array import array
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from .beam_search import BeamSearchParams
from .block_hashes import BlockHashes

if TYPE_CHECKING:
    from .sequence_group import SequenceGroup


class SequenceStatus(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class FinishReason(Enum):
    """Values are those of octavo.v1.FinishReason; CANCELLED never leaves the coordinator."""

    CANCELLED = 0
    STOP = 1
    LENGTH = 2


@dataclass(frozen=True, slots=True)
class StopConditions:
    """When a sequence ends by itself."""

    max_tokens: int
    min_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class RequestKey:
    """Names a request, or one of its outputs, among all gateways."""

    session_id: int
    handle: int

    def output(self, index: int) -> "RequestKey":
        """Of the request's output `index`; the first has the request's own."""
        return RequestKey(self.session_id, self.handle + index) if index else self


@dataclass(frozen=True, slots=True)
class ResumedOutput:
    """What the reader of an output that has not ended has of it, from a coordinator before this one."""

    index: int
    token_ids: "array[int]"  # generated ones, of C ints; none of a beam search, which begins again
    num_prompt_logprobs: int = 0  # of the first output


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One accepted request. `sampling` is handed to the workers as it is; the core never looks inside."""

    key: RequestKey
    prompt_token_ids: "array[int]"  # of C ints
    stop: StopConditions
    priority: int = 0
    sampling: Any = None
    num_samples: int = 1  # outputs
    beam_search: BeamSearchParams | None = None
    salt: bytes = b""  # requests share cached blocks only with those of the same
    reads_cache: bool = True  # False where every prompt token must be computed, for its logprobs
    is_private: bool = False  # no other request has its salt: what it computed is of no use after it
    resumed: "tuple[ResumedOutput, ...]" = ()  # accepted before: its open outputs; none: it is new


_TRANSITIONS = {
    (SequenceStatus.WAITING, SequenceStatus.RUNNING),
    (SequenceStatus.RUNNING, SequenceStatus.WAITING),
    (SequenceStatus.WAITING, SequenceStatus.FINISHED),
    (SequenceStatus.RUNNING, SequenceStatus.FINISHED),
}


class Sequence:
    """One sample or beam of a request. Only the Scheduler calls the transitions.

    Counters, as in docs/architecture.md: `num_tokens` known, `num_computed_tokens` by results that came back,
    `num_inflight_tokens` and `num_inflight_samples` by plans on their way.
    """

    __slots__ = (
        "_hashes",
        "finish_reason",
        "group_id",
        "history",
        "index",
        "is_joined",
        "key",
        "max_num_tokens",
        "num_computed_tokens",
        "num_inflight_samples",
        "num_inflight_tokens",
        "num_preemptions",
        "num_prompt_tokens",
        "num_published_blocks",
        "num_scored_prompt_tokens",
        "order",
        "request",
        "samples",
        "slot",
        "status",
        "token_ids",
        "waits_for_step",
    )

    def __init__(
        self, samples: "SequenceGroup", index: int, token_ids: "array[int]", hashes: BlockHashes | None = None
    ) -> None:
        """`index` among the sequences of its request; `token_ids` may be the request's prompt, which is not copied
        before there is more; `hashes` know names of its blocks beyond the prompt, if any are known."""
        request = samples.request
        self.samples = samples
        self.request = request
        self.index = index
        self.key = request.key.output(index)  # of beams only while they run: the best take the first keys
        self.order = (request.priority, samples.arrival, index)  # lower is served first and preempted last
        self.token_ids = token_ids
        self._hashes = hashes
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.max_num_tokens = samples.max_num_tokens
        self.num_published_blocks = 0  # full blocks of its table that the cache was told of
        self.is_joined = False  # whether the workers know of its slot
        self.waits_for_step = 0  # whose transfers bring its blocks
        self.num_computed_tokens = 0
        self.num_inflight_tokens = 0
        self.num_inflight_samples = 0
        self.num_preemptions = 0
        self.num_scored_prompt_tokens = 1  # whose logprobs went out; the first token has none
        self.slot = -1
        self.group_id = -1
        self.status = SequenceStatus.WAITING
        self.finish_reason: FinishReason | None = None
        self.history: list[str] = []

    @property
    def is_running(self) -> bool:
        return self.status is SequenceStatus.RUNNING

    @property
    def reads_cache(self) -> bool:
        """Whether cached blocks spare it anything: not the first sample if each prompt token's logprobs are due."""
        return self.request.reads_cache or self.index > 0

    def block_names(self, num_blocks: int) -> list[bytes]:
        """Of its first blocks, all full; see core/block_hashes.py. Those of the prompt are shared by all samples."""
        block_size = self.samples.hashes.block_size
        if num_blocks * block_size <= self.num_prompt_tokens:
            return self.samples.hashes.first(num_blocks, self.request.prompt_token_ids)
        if self._hashes is None:
            self.samples.hashes.first(self.num_prompt_tokens // block_size, self.request.prompt_token_ids)
            self._hashes = self.samples.hashes.fork()
        return self._hashes.first(num_blocks, self.token_ids)

    def fork_hashes(self) -> BlockHashes | None:
        """For a sequence that has all tokens of this one."""
        return self._hashes.fork() if self._hashes is not None else None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_sent_tokens(self) -> int:
        """Tokens whose KV is in the blocks, or will be by plans that were sent."""
        return self.num_computed_tokens + self.num_inflight_tokens

    @property
    def num_pending_tokens(self) -> int:
        """Tokens that the next step may compute: known or being sampled, and neither computed nor on their way.

        0 when all that may be sampled is on its way. What follows a beam's sample is not known before its result.
        """
        expected = len(self.token_ids) + self.num_inflight_samples
        if expected >= self.max_num_tokens or (self.num_inflight_samples and self.samples.beams is not None):
            return 0
        return expected - self.num_computed_tokens - self.num_inflight_tokens

    def start(self, group_id: int, slot: int) -> None:
        """WAITING to RUNNING: takes a slot of a group."""
        self._become(SequenceStatus.RUNNING, f"group {group_id} slot {slot}")
        self.group_id, self.slot = group_id, slot

    def preempt(self, why: str) -> None:
        """RUNNING to WAITING: keeps its tokens, loses its slot, its KV and what is in flight."""
        self._become(SequenceStatus.WAITING, why)
        self.num_preemptions += 1
        self._leave()

    def finish(self, reason: FinishReason) -> None:
        """To FINISHED, from anywhere."""
        self._become(SequenceStatus.FINISHED, reason.name)
        self.finish_reason = reason
        self._leave()

    def dispatch(self, num_tokens: int, samples: bool) -> None:
        """A plan that computes `num_tokens` more tokens is on its way."""
        self.num_inflight_tokens += num_tokens
        self.num_inflight_samples += samples

    def computed(self, num_tokens: int) -> None:
        """The result of a plan came back."""
        self.num_computed_tokens += num_tokens
        self.num_inflight_tokens -= num_tokens

    def sampled(self) -> None:
        """A sample came back; what becomes of it is decided elsewhere."""
        self.num_inflight_samples -= 1

    def append(self, token_id: int) -> FinishReason | None:
        """Takes a token; returns why the sequence is now complete, if it is."""
        if self.token_ids is self.request.prompt_token_ids:
            self.token_ids = array("i", self.token_ids)
        self.token_ids.append(token_id)
        stop = self.request.stop
        if token_id in stop.stop_token_ids and self.num_output_tokens >= stop.min_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(self.token_ids) >= self.max_num_tokens else None

    def score_prompt(self, start: int, num_rows: int) -> int:
        """Takes note of logprobs of `num_rows` prompt tokens from position `start`.

        Returns how many of them went out before, in a life that a preemption ended.
        """
        num_known = max(0, self.num_scored_prompt_tokens - start)
        self.num_scored_prompt_tokens = max(self.num_scored_prompt_tokens, start + num_rows)
        return min(num_known, num_rows)

    def _leave(self) -> None:
        self.is_joined = False
        self.slot = self.group_id = -1
        self.waits_for_step = 0
        self.num_computed_tokens = self.num_inflight_tokens = self.num_inflight_samples = 0

    def _become(self, status: SequenceStatus, why: str) -> None:
        if (self.status, status) not in _TRANSITIONS:
            change = f"{self.status.value} to {status.value}"
            raise AssertionError(f"{self.request.key} cannot go from {change}: {self.history}")
        self.history.append(f"{self.status.value} -> {status.value}: {why}")
        self.status = status
