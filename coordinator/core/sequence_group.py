"""The samples or beams of one request, and what binds them together."""

from array import array
from dataclasses import dataclass

from .beam_search import BeamSearch, Candidates, Hypothesis
from .block_hashes import BlockHashes
from .sequence import FinishReason, Request, RequestKey, Sequence


@dataclass(frozen=True, slots=True)
class BeamOutput:
    """One output of a beam search that has ended."""

    key: RequestKey
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    score: float
    num_cached_tokens: int  # of the prompt


class SequenceGroup:
    """The sequences of one request that have not ended.

    The first to run, the leader, computes the prompt. The other samples are `held` until then, and begin with its
    blocks. From then on samples go their own ways. Beams run in step: they hold slots, wait and are preempted together;
    while they wait, all but the leader are held.
    """

    def __init__(self, request: Request, arrival: int, block_size: int, max_model_len: int) -> None:
        self.request = request
        self.arrival = arrival
        self.has_failed = False  # whether an output could not be served
        self.num_cached_tokens = -1  # of the prompt, found when the first sequence took a slot; before, -1
        num_prompt_tokens = len(request.prompt_token_ids)
        self.max_num_tokens = min(num_prompt_tokens + request.stop.max_tokens, max_model_len)  # of each sequence
        self.hashes = BlockHashes(request.salt, block_size)  # of the prompt's blocks
        self.sequences = self._new_sequences()
        has_begun = any(sequence.num_output_tokens for sequence in self.sequences)
        self.held = [] if has_begun else self.sequences[1:]  # as after a preemption of all, or as at the start
        self.beams: Beams | None = None
        if params := request.beam_search:
            max_tokens = self.max_num_tokens - num_prompt_tokens
            self.beams = Beams(self, BeamSearch(params, request.stop.stop_token_ids, max_tokens))

    def _new_sequences(self) -> list[Sequence]:
        """The one of a beam search; of samples those that have not ended, with the tokens that their reader has."""
        request, prompt = self.request, self.request.prompt_token_ids
        if request.beam_search:
            return [Sequence(self, 0, prompt)]
        if not request.resumed:
            return [Sequence(self, index, prompt) for index in range(request.num_samples)]
        sequences = []
        for output in sorted(request.resumed, key=lambda output: output.index):
            sequence = Sequence(self, output.index, prompt + output.token_ids if output.token_ids else prompt)
            sequence.num_scored_prompt_tokens += output.num_prompt_logprobs
            sequences.append(sequence)
        return sequences

    @property
    def keys(self) -> list[RequestKey]:
        """Of its outputs that have not ended."""
        if self.beams is None:
            return [sequence.key for sequence in self.sequences]
        return [self.request.key.output(index) for index in range(self.request.num_samples)]

    def sequence(self, key: RequestKey) -> Sequence:
        """The unfinished sample of that key."""
        return next(sequence for sequence in self.sequences if sequence.key == key)

    def take_held(self) -> list[Sequence]:
        """All that were held, to be held no more."""
        held, self.held = self.held, []
        return held


class Beams:
    """What a request with beam search has beside its sequences, which are in the order of the search's beams."""

    def __init__(self, samples: SequenceGroup, search: BeamSearch) -> None:
        self.num_beams = search.params.num_beams
        self.forks: list[tuple[Sequence, Sequence]] = []  # parent and child, which is to share its blocks
        self.sampled: dict[Sequence, int] = {}  # what the workers took for the next token of those that know:
        self._candidates: dict[Sequence, Candidates] = {}
        self._samples, self._search = samples, search
        self._num_forked = 1

    def take(self, sequence: Sequence, candidates: Candidates, sampled: int) -> None:
        """The result of a beam's step."""
        self._candidates[sequence] = candidates
        self.sampled[sequence] = sampled

    @property
    def is_complete(self) -> bool:
        """Whether all beams know their candidates, so that the search can go on."""
        return len(self._candidates) == len(self._samples.sequences)

    def interrupt(self) -> None:
        """The beams lose their slots. What was sampled and not used is sampled again."""
        self.forks, self._candidates, self.sampled = [], {}, {}

    def take_forks(self) -> list[tuple[Sequence, Sequence]]:
        """Pairs of parent and child that have not been served, the child to run on with its parent's blocks."""
        forks, self.forks = self.forks, []
        return forks

    def advance(self) -> tuple[list[Sequence], dict[Sequence, int]]:
        """The search's next step. Each beam that has continuations goes on with the first of them, and forks for each
        other: `forks` has those. Returns the beams that have none, and the token that each other one is to get; no
        token means that the search has ended."""
        before = list(self._samples.sequences)
        outputs = [sequence.token_ids[sequence.num_prompt_tokens :] for sequence in before]
        continuations = self._search.advance([self._candidates[sequence] for sequence in before], outputs)
        self._candidates, self.sampled = {}, {}
        tokens: dict[Sequence, int] = {}
        after: list[Sequence] = []
        for continuation in continuations:
            parent = before[continuation.parent]
            if parent not in tokens:
                tokens[parent] = continuation.token_id
                after.append(parent)
            else:
                child = self._fork(parent, continuation.token_id)
                self.forks.append((parent, child))
                after.append(child)
        dropped = [sequence for sequence in before if sequence not in tokens]
        self._samples.sequences = [*after, *dropped]
        return dropped, tokens

    def _fork(self, parent: Sequence, token_id: int) -> Sequence:
        tokens = parent.token_ids + array("i", [token_id])
        child = Sequence(parent.samples, self._num_forked, tokens, parent.fork_hashes())
        self._num_forked += 1
        return child

    def outputs(self) -> list[BeamOutput]:
        """The best of the finished ones, once the search has ended."""
        request = self._samples.request
        best = self._search.finished[: request.num_samples]
        assert len(best) == request.num_samples
        return [
            BeamOutput(key, hypothesis.token_ids, self._reason(hypothesis), hypothesis.score, self._num_cached_tokens)
            for key, hypothesis in zip(self._samples.keys, best, strict=True)
        ]

    @property
    def _num_cached_tokens(self) -> int:
        return max(0, self._samples.num_cached_tokens)

    def _reason(self, hypothesis: Hypothesis) -> FinishReason:
        stops = self._samples.request.stop.stop_token_ids
        return FinishReason.STOP if hypothesis.token_ids[-1] in stops else FinishReason.LENGTH
