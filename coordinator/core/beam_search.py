"""Beam search over one request: which continuations of its beams go on, and which are done.

The rule is that of transformers' `generate` with `num_beams` and without sampling, in its float32 arithmetic, so that
the outputs are the same token for token. In each step the best continuations of all beams together are ranked; those
that end join the finished ones if they are among the first `num_beams`, and the best `num_beams` others go on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
_NEVER = np.float32(-1e9)  # a score that no continuation has


class EarlyStopping(Enum):
    """When a search ends whose running beams could go on. Values are those of octavo.internal.v1.EarlyStopping."""

    HEURISTIC = 1  # no running beam is likely to do better, by its present length
    FIRST = 2  # there are num_beams outputs
    NEVER = 3  # no running beam can do better


@dataclass(frozen=True, slots=True)
class BeamSearchParams:
    """Of one request."""

    num_beams: int
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = EarlyStopping.HEURISTIC

    def num_candidates(self, num_stop_tokens: int) -> int:
        """Continuations to rank: even if every stop token is among each beam's best, num_beams others are."""
        return max(2, 1 + num_stop_tokens) * self.num_beams


@dataclass(frozen=True, slots=True)
class Candidates:
    """A beam's likeliest next tokens with their log probabilities, at least as many as are ranked."""

    token_ids: Sequence[int]
    logprobs: Floats


@dataclass(frozen=True, slots=True)
class Continuation:
    """A beam of the next step: `parent` is its index among the beams of this one."""

    parent: int
    token_id: int


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A finished output. `score` is its log probability over its length ^ length_penalty."""

    score: float
    token_ids: tuple[int, ...]  # generated ones


class BeamSearch:
    """The scores of one request's beams and its finished outputs. The beams' own tokens are its owner's."""

    def __init__(self, params: BeamSearchParams, stop_token_ids: frozenset[int], max_tokens: int) -> None:
        self.params = params
        self.finished: list[Hypothesis] = []  # the best first
        self._stop_token_ids = stop_token_ids
        self._max_tokens = max_tokens
        self._num_ranked = params.num_candidates(len(stop_token_ids))
        self._scores: Floats = np.zeros(1, np.float32)  # of the running beams; at first there is one
        self._num_steps = 0

    def advance(self, candidates: Sequence[Candidates], outputs: Sequence[Sequence[int]]) -> list[Continuation]:
        """One step, of candidates and tokens so far of each running beam. The beams of the next, the best first;
        none when the search has ended."""
        self._num_steps += 1
        scores, beams, token_ids = self._rank(candidates)
        ends = np.array([self._ends(token_id) for token_id in token_ids])
        self._take_finished(scores, beams, token_ids, ends, outputs)
        going = np.flatnonzero(~ends)[: self.params.num_beams]
        if len(going) < self.params.num_beams or not self._may_improve(scores[going[0]]):
            return []
        self._scores = scores[going]
        return [Continuation(int(beams[index]), int(token_ids[index])) for index in going]

    def _rank(self, candidates: Sequence[Candidates]) -> tuple[Floats, NDArray[np.int64], NDArray[np.int64]]:
        """Scores, beams and tokens of the best continuations of all beams, the best first."""
        scores = np.concatenate([s + of.logprobs for s, of in zip(self._scores, candidates, strict=True)])
        beams = np.repeat(np.arange(len(candidates)), [len(of.token_ids) for of in candidates])
        token_ids = np.concatenate([np.asarray(of.token_ids, np.int64) for of in candidates])
        # Of equal scores the lower beam and token first, so that every replay decides alike.
        best = np.lexsort((token_ids, beams, -scores))[: self._num_ranked]
        return scores[best], beams[best], token_ids[best]

    def _ends(self, token_id: int) -> bool:
        return self._num_steps >= self._max_tokens or int(token_id) in self._stop_token_ids

    def _take_finished(
        self,
        scores: Floats,
        beams: NDArray[np.int64],
        token_ids: NDArray[np.int64],
        ends: NDArray[np.bool_],
        outputs: Sequence[Sequence[int]],
    ) -> None:
        for index in np.flatnonzero(ends[: self.params.num_beams]):
            output = (*outputs[beams[index]], int(token_ids[index]))
            self.finished.append(Hypothesis(float(self._penalised(scores[index], self._num_steps)), output))
        self.finished.sort(key=lambda hypothesis: -hypothesis.score)  # stable: of equals the older first
        del self.finished[self.params.num_beams :]

    def _penalised(self, score: np.float32, length: int) -> np.float32:
        return np.float32(score / np.float32(length**self.params.length_penalty))

    def _may_improve(self, best_running: np.float32) -> bool:
        if len(self.finished) < self.params.num_beams:
            return True
        if self.params.early_stopping is EarlyStopping.FIRST:
            return False
        longest = self.params.early_stopping is EarlyStopping.NEVER and self.params.length_penalty > 0
        length = self._max_tokens if longest else self._num_steps
        return bool(self._penalised(best_running, length) > np.float32(self.finished[-1].score))
