"""What comes back from a step, and what it means."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from .batch_plan import BatchPlan
from .beam_search import Candidates
from .sequence import FinishReason, RequestKey
from .sequence_group import BeamOutput


@dataclass(frozen=True, slots=True)
class PromptScores:
    """Prompt logprobs of one chunk: `num_rows` of them, the first about the token at position `start`."""

    chunk: int  # index into the plan's chunk_slots
    start: int
    num_rows: int


class CandidatesOfRow(Protocol):
    """Looks up what a sampling row, by its index among them, says of its likeliest tokens."""

    def __call__(self, row: int, /) -> Candidates: ...


def _no_candidates(row: int, /) -> Candidates:
    raise AssertionError(f"sampling row {row} is a beam's, and its candidates did not come")


@dataclass(frozen=True, slots=True)
class StepReport:
    """The result of a group's oldest step in flight."""

    token_ids: Sequence[int]  # sampled, in row order
    scores: Collection[PromptScores] = ()
    candidates: CandidatesOfRow = _no_candidates  # of rows that are beams
    model_time_us: int = 0  # how long the workers were at it; 0: not measured
    finished_transfers: int = 0  # the last step whose transfers, and all before, have ended
    failed_rows: Collection[int] = ()  # those for which nothing could be sampled


@dataclass(frozen=True, slots=True)
class SampledToken:
    """What a step gave one sequence. `row` is its index among the step's sampling rows."""

    key: RequestKey
    token_id: int
    finish_reason: FinishReason | None
    row: int
    num_cached_tokens: int  # of the prompt; 0 from the second token on


@dataclass(frozen=True, slots=True)
class AcceptedScores:
    """What is new in the PromptScores at `index`: all but the first `num_skipped` rows."""

    key: RequestKey
    index: int
    num_skipped: int


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What a step's result means."""

    plan: BatchPlan
    tokens: list[SampledToken] = field(default_factory=list)
    beams: list[BeamOutput] = field(default_factory=list)
    scores: list[AcceptedScores] = field(default_factory=list)
    failed: list[RequestKey] = field(default_factory=list)  # outputs, and beam searches, that ended for want of a token
