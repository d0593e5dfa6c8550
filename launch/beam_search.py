"""Beam search, shaped as vLLM's users expect: BeamSearchParams in, BeamSearchOutput out.

The search itself is transformers': a sequence's score is its log probability / its number of generated tokens ^
length_penalty, and `early_stopping` is that of `generate`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import InvalidArgumentError
from ..proto import generation_pb2
from .outputs import CompletionOutput, RequestOutput
from .sampling_params import check_items, check_range, refusal

_EARLY_STOPPING = {
    False: generation_pb2.EARLY_STOPPING_HEURISTIC,
    True: generation_pb2.EARLY_STOPPING_FIRST,
    "never": generation_pb2.EARLY_STOPPING_NEVER,
}


@dataclass(frozen=True, slots=True)
class BeamSearchParams:
    """Construction checks every field. Raises InvalidArgumentError naming the first that is out of range."""

    beam_width: int  # in [2, 64]
    max_tokens: int | None = 16  # None: up to the context length
    ignore_eos: bool = False
    temperature: float = 0.0  # vLLM has it; only 0 is served
    length_penalty: float = 1.0
    early_stopping: bool | str = False  # False, True or "never"
    n: int | None = None  # of the best; None: all beam_width
    stop_token_ids: Sequence[int] | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        check_range("beam_width", self.beam_width)
        check_range("length_penalty", self.length_penalty)
        if self.max_tokens is not None:
            check_range("max_tokens", self.max_tokens)
        if self.n is not None:
            check_range("n", self.n)
        if self.n is not None and self.n > self.beam_width:
            raise refusal("beam_width", f"must be at least n, got {self.beam_width} with n {self.n}")
        if self.temperature != 0:
            raise refusal("temperature", f"must be 0 in a beam search, got {self.temperature!r}")
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise refusal("early_stopping", f"must be False, True or 'never', got {self.early_stopping!r}")
        check_items("stop_token_ids", self.stop_token_ids, int, "integers")

    def to_proto(self) -> generation_pb2.SamplingParams:
        """Raises InvalidArgumentError for a value that protobuf does not take."""
        try:
            return generation_pb2.SamplingParams(
                n=self.beam_width if self.n is None else self.n,
                num_beams=self.beam_width,
                length_penalty=self.length_penalty,
                early_stopping=_EARLY_STOPPING[self.early_stopping],
                temperature=0,
                max_tokens=self.max_tokens,
                ignore_eos=self.ignore_eos,
                stop_token_ids=self.stop_token_ids,
                skip_special_tokens=self.skip_special_tokens,
            )
        except (TypeError, ValueError) as error:
            raise InvalidArgumentError(f"beam search parameters: {error}") from error


@dataclass(slots=True)
class BeamSearchSequence:
    """One of the best sequences."""

    tokens: list[int]  # the prompt's too
    cum_logprob: float  # of the generated tokens
    score: float  # what the sequences are ranked by
    text: str | None = None  # of all tokens; None where the server has no tokenizer
    finish_reason: str | None = None  # "stop" or "length"
    stop_reason: str | int | None = None


@dataclass(slots=True)
class BeamSearchOutput:
    """The best sequences for one prompt, best first."""

    sequences: list[BeamSearchSequence]


def beam_search_output(output: RequestOutput, params: BeamSearchParams) -> BeamSearchOutput:
    """Without text."""
    sequences = [_sequence(output.prompt_token_ids, sample, params.length_penalty) for sample in output.outputs]
    return BeamSearchOutput(sequences)


def add_text(outputs: Sequence[BeamSearchOutput], detokenize: Callable[[list[list[int]]], list[str]]) -> None:
    """The text of all sequences, in one call."""
    sequences = [sequence for output in outputs for sequence in output.sequences]
    texts = detokenize([sequence.tokens for sequence in sequences])
    for sequence, text in zip(sequences, texts, strict=True):
        sequence.text = text


def _sequence(prompt: list[int], sample: CompletionOutput, length_penalty: float) -> BeamSearchSequence:
    assert sample.beam_score is not None, "the outputs of a beam search have scores"
    return BeamSearchSequence(
        tokens=prompt + sample.token_ids,
        cum_logprob=sample.beam_score * len(sample.token_ids) ** length_penalty,
        score=sample.beam_score,
        finish_reason=sample.finish_reason,
        stop_reason=sample.stop_reason,
    )
