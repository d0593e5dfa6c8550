"""One sequence's engine tokens to what a client reads: text, stop strings, usage. Pure: values in, values out."""

from collections.abc import Sequence
from dataclasses import dataclass

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
    """News of one sequence. The last has a finish reason."""

    text: str
    token_ids: Sequence[int]
    logprobs: Sequence[PositionLogprobs]  # beside token_ids, when asked for
    finish_reason: int = UNFINISHED  # octavo.v1.FinishReason
    stop_reason: str | int | None = None  # the stop string or named stop token that ended it
    num_output_tokens: int = 0  # so far
    prompt_logprobs: Sequence[PositionLogprobs] = ()  # from position 1 on; in the first delta, when asked for


class OutputAssembler:
    """Owner of one sequence's text state. Without a detokenizer (token ids only) the text stays empty."""

    def __init__(self, options: OutputOptions, detokenizer: Detokenizer | None) -> None:
        self._options = options
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
            text,
            delta.token_ids[:num_tokens],
            delta.logprobs[:num_tokens],
            finish_reason,
            stop_reason,
            self._num_tokens,
            delta.prompt_logprobs,
        )


def merge(deltas: Sequence[OutputDelta]) -> OutputDelta:
    """Consecutive deltas of one sequence as one."""
    last = deltas[-1]
    return OutputDelta(
        "".join([delta.text for delta in deltas]),
        [token_id for delta in deltas for token_id in delta.token_ids],
        [row for delta in deltas for row in delta.logprobs],
        last.finish_reason,
        last.stop_reason,
        last.num_output_tokens,
        [row for delta in deltas for row in delta.prompt_logprobs],
    )
