"""A request's engine tokens to what a client reads: text, stop strings, usage. Pure: values in, values out."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..proto import generation_pb2
from .detokenizer import Detokenizer
from .engine_stream import EngineDelta
from .logprobs import PositionLogprobs
from .stop import StopStringMatcher

STOP = generation_pb2.FINISH_REASON_STOP
LENGTH = generation_pb2.FINISH_REASON_LENGTH
UNFINISHED = generation_pb2.FINISH_REASON_UNSPECIFIED


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """How one request's output is made from its tokens."""

    stop: tuple[str, ...]
    include_stop_str_in_output: bool
    skip_special_tokens: bool
    min_tokens: int
    # Ids that the client named as stops; another stop token is the end-of-sequence one and is no stop reason.
    named_stop_token_ids: frozenset[int]


@dataclass(frozen=True, slots=True)
class OutputDelta:
    """News of one sample. The last has a finish reason."""

    index: int
    text: str
    token_ids: Sequence[int]
    logprobs: Sequence[PositionLogprobs]  # beside token_ids, when asked for
    finish_reason: int = UNFINISHED  # octavo.v1.FinishReason
    stop_reason: str | int | None = None  # the stop string or named stop token that ended it
    num_output_tokens: int = 0  # so far
    beam_score: float | None = None  # with the finish reason, of a beam search


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a request, or of several. Completion tokens are those of all samples drawn, returned or not."""

    num_prompt_tokens: int
    num_completion_tokens: int
    num_cached_tokens: int  # of the prompt's

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            self.num_prompt_tokens + other.num_prompt_tokens,
            self.num_completion_tokens + other.num_completion_tokens,
            self.num_cached_tokens + other.num_cached_tokens,
        )


@dataclass(frozen=True, slots=True)
class RequestDelta:
    """News of one request, of each sample that has some, by ascending index. The last has usage."""

    outputs: Sequence[OutputDelta]
    prompt_logprobs: Sequence[PositionLogprobs] = ()  # from position 1 on; the same in every delta, when asked for
    usage: Usage | None = None


class OutputAssembler:
    """Owner of one sample's text state. Without a detokenizer (token ids only) the text stays empty."""

    def __init__(self, options: OutputOptions, detokenizer: Detokenizer | None, index: int = 0) -> None:
        self._options = options
        self._index = index
        self._detokenizer = detokenizer
        self._matcher = None
        if options.stop:
            self._matcher = StopStringMatcher(options.stop, options.include_stop_str_in_output)
        self._num_tokens = 0

    def push(self, delta: EngineDelta) -> OutputDelta:
        """Reads new tokens. A stop string ends the sequence at the token that completes it; later ones are dropped."""
        texts = self._texts(delta)
        pieces: list[str] = []
        for index, text in enumerate(texts):
            match = self._match(text, self._num_tokens + index + 1)
            pieces.append(match[0])
            if match[1] is not None:
                return self._output(delta, "".join(pieces), index + 1, STOP, match[1])
        if delta.finish_reason:
            pieces.append(self._flush())
        return self._output(delta, "".join(pieces), len(delta.token_ids), delta.finish_reason, self._named(delta))

    def _texts(self, delta: EngineDelta) -> list[str]:
        """The text of each token, or of all at once where nobody asks which token ended it."""
        if self._detokenizer is None:
            return []
        token_ids = delta.token_ids
        if delta.finish_reason == STOP and not self._options.include_stop_str_in_output:
            token_ids = token_ids[:-1]  # the stop token's own text stays out
        if self._matcher is None:
            return [self._detokenizer.push(token_ids)]
        return [self._detokenizer.push([token_id]) for token_id in token_ids]

    def _match(self, text: str, num_tokens: int) -> tuple[str, str | None]:
        if self._matcher is None:
            return text, None
        match = self._matcher.push(text, may_stop=num_tokens > self._options.min_tokens)
        return match.text, match.stop_string

    def _flush(self) -> str:
        """What was held back, when nothing follows any more."""
        rest = self._detokenizer.finish() if self._detokenizer is not None else ""
        if self._matcher is None:
            return rest
        match = self._matcher.push(rest, may_stop=False)
        return match.text + self._matcher.finish()

    def _named(self, delta: EngineDelta) -> int | None:
        """The stop token that ended it, if the client named it."""
        if delta.finish_reason != STOP or delta.token_ids[-1] not in self._options.named_stop_token_ids:
            return None
        return delta.token_ids[-1]

    def _output(
        self, delta: EngineDelta, text: str, num_tokens: int, finish_reason: int, stop_reason: str | int | None
    ) -> OutputDelta:
        self._num_tokens += num_tokens
        return OutputDelta(
            self._index,
            text,
            delta.token_ids[:num_tokens],
            delta.logprobs[:num_tokens],
            finish_reason,
            stop_reason,
            self._num_tokens,
            delta.beam_score,
        )


def merge(deltas: Sequence[RequestDelta]) -> RequestDelta:
    """All deltas of one request as one."""
    samples: dict[int, list[OutputDelta]] = {}
    for delta in deltas:
        for output in delta.outputs:
            samples.setdefault(output.index, []).append(output)
    outputs = [_merge_sample(samples[index]) for index in sorted(samples)]
    return RequestDelta(outputs, deltas[-1].prompt_logprobs, deltas[-1].usage)


def _merge_sample(deltas: Sequence[OutputDelta]) -> OutputDelta:
    if len(deltas) == 1:
        return deltas[0]
    last = deltas[-1]
    return OutputDelta(
        last.index,
        "".join([delta.text for delta in deltas]),
        [token_id for delta in deltas for token_id in delta.token_ids],
        [row for delta in deltas for row in delta.logprobs],
        last.finish_reason,
        last.stop_reason,
        last.num_output_tokens,
        last.beam_score,
    )


def best(delta: RequestDelta, n: int) -> RequestDelta:
    """The n outputs of highest mean log probability, best first, as the only ones; usage stays that of all."""
    ranked = sorted(delta.outputs, key=_mean_logprob, reverse=True)[:n]
    return replace(delta, outputs=[replace(output, index=index) for index, output in enumerate(ranked)])


def _mean_logprob(output: OutputDelta) -> float:
    return sum(row.token.logprob for row in output.logprobs) / len(output.logprobs)


def without_logprobs(delta: RequestDelta) -> RequestDelta:
    return replace(delta, outputs=[replace(output, logprobs=()) for output in delta.outputs])
