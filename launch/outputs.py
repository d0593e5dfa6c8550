"""What generation returns, shaped as vLLM's users expect: RequestOutput and CompletionOutput."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from ..proto import generation_pb2

_FINISH_REASONS = {
    generation_pb2.FINISH_REASON_UNSPECIFIED: None,
    generation_pb2.FINISH_REASON_STOP: "stop",
    generation_pb2.FINISH_REASON_LENGTH: "length",
}


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token at one position, in the model's own distribution."""

    logprob: float
    rank: int  # 1 is the likeliest token of the vocabulary
    decoded_token: str


# By token id: the token at the position first, then the most likely ones.
PositionLogprobs = dict[int, Logprob]


@dataclass(slots=True)
class CompletionOutput:
    """One sample of a request: all of it, or in a stream what is new since the output before."""

    index: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: str | None = None  # "stop" or "length", when finished
    stop_reason: str | int | None = None  # the stop string or token id that ended it; None for the end of sequence
    beam_score: float | None = None  # of beam search, when finished

    @property
    def cumulative_logprob(self) -> float | None:
        """Sum over the tokens; None when no logprobs were asked for."""
        if self.logprobs is None:
            return None
        rows = zip(self.token_ids, self.logprobs, strict=True)
        return sum(row[token_id].logprob for token_id, row in rows)


@dataclass(slots=True)
class RequestOutput:
    """One request's output."""

    request_id: str = ""
    prompt: str | None = None  # None for token ids and chats
    prompt_token_ids: list[int] = field(default_factory=list)
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    prompt_logprobs: list[PositionLogprobs | None] | None = None  # one a prompt token; the first is None
    num_cached_tokens: int | None = None  # of the prompt, found in the prefix cache; when finished

    @classmethod
    def of(cls, response: generation_pb2.GenerateResponse, prompt: str | None) -> "RequestOutput":
        """What one response says."""
        output = cls(request_id=response.request_id, prompt=prompt, finished=response.HasField("usage"))
        output.prompt_token_ids = list(response.prompt_token_ids)
        output.outputs = [_completion(sample) for sample in response.outputs]
        if output.finished:
            output.num_cached_tokens = response.usage.cached_tokens
        if response.prompt_logprobs:
            output.prompt_logprobs = [_row(row) or None for row in response.prompt_logprobs]
        return output

    def extend(self, delta: "RequestOutput") -> None:
        """Appends what a later response of the same request says."""
        self.request_id = self.request_id or delta.request_id
        self.finished = self.finished or delta.finished
        if delta.num_cached_tokens is not None:
            self.num_cached_tokens = delta.num_cached_tokens
        self.prompt_token_ids += delta.prompt_token_ids
        self.prompt_logprobs = self.prompt_logprobs or delta.prompt_logprobs
        for sample in delta.outputs:
            _extend(self._sample(sample.index), sample)

    def _sample(self, index: int) -> CompletionOutput:
        while len(self.outputs) <= index:
            self.outputs.append(CompletionOutput(index=len(self.outputs)))
        return self.outputs[index]


def merge_outputs(deltas: Iterable[RequestOutput]) -> RequestOutput:
    """A whole stream as one output."""
    whole = RequestOutput()
    for delta in deltas:
        whole.prompt = delta.prompt
        whole.extend(delta)
    return whole


def _extend(whole: CompletionOutput, delta: CompletionOutput) -> None:
    whole.text += delta.text
    whole.token_ids += delta.token_ids
    if delta.logprobs is not None:
        whole.logprobs = (whole.logprobs or []) + delta.logprobs
    whole.finish_reason = delta.finish_reason or whole.finish_reason
    whole.stop_reason = delta.stop_reason if delta.stop_reason is not None else whole.stop_reason
    whole.beam_score = delta.beam_score if delta.beam_score is not None else whole.beam_score


def _completion(sample: generation_pb2.SequenceOutput) -> CompletionOutput:
    stop = sample.WhichOneof("stop_reason")
    stop_reason = {None: None, "stop_string": sample.stop_string, "stop_token_id": sample.stop_token_id}[stop]
    return CompletionOutput(
        index=sample.index,
        text=sample.text,
        token_ids=list(sample.token_ids),
        logprobs=[_row(row) for row in sample.logprobs] if sample.logprobs else None,
        finish_reason=_FINISH_REASONS[sample.finish_reason],
        stop_reason=stop_reason,
        beam_score=sample.beam_score if sample.HasField("beam_score") else None,
    )


def _row(row: generation_pb2.TokenLogprobs) -> PositionLogprobs:
    """Empty for a position without a token before it."""
    entries = [row.token, *row.top] if row.HasField("token") else []
    return {entry.token_id: Logprob(entry.logprob, entry.rank, entry.text) for entry in entries}
