"""How many outputs a request wants, and how they are found: n, best_of, beam search.

As in sampling.py, the bounds are those of proto/generation.proto, and a refusal names the field.
"""

from dataclasses import dataclass

from ..errors import InvalidArgumentError
from ..proto import engine_pb2, generation_pb2
from .sampling import SamplingRequest, in_range

MAX_SAMPLES = 128
MAX_BEAMS = 64
MAX_LENGTH_PENALTY = 10
HEURISTIC = generation_pb2.EARLY_STOPPING_HEURISTIC

# Of a beam search's request: the fields that would change or report logits or cut its text, at what does nothing.
_OFF_IN_BEAM_SEARCH: dict[str, tuple[object, ...]] = {
    "temperature": (None, 0),
    "top_p": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "min_tokens": (0,),
    "logprobs": (None,),
    "prompt_logprobs": (None,),
}
_EMPTY_IN_BEAM_SEARCH = ("logit_bias", "bad_words", "stop")


@dataclass(frozen=True, slots=True)
class Samples:
    """What is drawn, and what of it the client gets."""

    n: int = 1
    num_drawn: int = 1
    beam_search: engine_pb2.BeamSearch | None = None

    @property
    def are_ranked(self) -> bool:
        """Whether the gateway picks the best of them; of beams the engine sends only the best."""
        return self.num_drawn > self.n


@dataclass(frozen=True, slots=True)
class StreamField:
    """The field by which a door was asked to stream, and how to ask for the whole output instead."""

    name: str
    remedy: str


def check_samples(request: SamplingRequest, vocab_size: int) -> Samples:
    """Raises InvalidArgumentError naming the field."""
    in_range("n", request.n, 1, MAX_SAMPLES)
    if request.best_of is not None:
        _check_best_of(request.best_of, request.n)
    in_range("num_beams", request.num_beams, 0, MAX_BEAMS)
    in_range("length_penalty", request.length_penalty, -MAX_LENGTH_PENALTY, MAX_LENGTH_PENALTY)
    if request.early_stopping not in generation_pb2.EarlyStopping.values():
        raise InvalidArgumentError(f"early_stopping: {request.early_stopping} is none of its values", "early_stopping")
    if request.is_beam_search:
        _check_beams(request, vocab_size)
        return Samples(request.n, request.n, _beam_search(request))
    _check_no_beams(request)
    return Samples(request.n, request.num_drawn)


def _check_best_of(best_of: int, n: int) -> None:
    if not n <= best_of <= MAX_SAMPLES:
        raise InvalidArgumentError(f"best_of must be in [n, {MAX_SAMPLES}], got {best_of} with n {n}", "best_of")


def _check_no_beams(request: SamplingRequest) -> None:
    """As in vLLM, several samples of one that is always the same are a mistake."""
    if request.is_greedy and request.num_drawn > 1:
        name = "n" if request.n > 1 else "best_of"
        message = f"{name} must be 1 at temperature 0, where all samples are the same; set a temperature or num_beams"
        raise InvalidArgumentError(message, name)
    for name, is_set in (
        ("length_penalty", request.length_penalty != 1),
        ("early_stopping", request.early_stopping not in (generation_pb2.EARLY_STOPPING_UNSPECIFIED, HEURISTIC)),
    ):
        if is_set:
            raise InvalidArgumentError(f"{name} is of beam search only: set num_beams to at least 2 too", name)


def _check_beams(request: SamplingRequest, vocab_size: int) -> None:
    num_beams = request.num_beams
    if num_beams < request.n:
        raise InvalidArgumentError(f"num_beams must be at least n, got {num_beams} with n {request.n}", "num_beams")
    if num_beams > vocab_size:
        message = f"num_beams ({num_beams}) is over the size of the vocabulary ({vocab_size})"
        raise InvalidArgumentError(message, "num_beams")
    if request.best_of not in (None, num_beams):
        message = f"best_of ({request.best_of}) must be num_beams ({num_beams}) in a beam search; leave it out"
        raise InvalidArgumentError(message, "best_of")
    for name, off in _OFF_IN_BEAM_SEARCH.items():
        if getattr(request, name) not in off:
            _refuse_in_beam_search(name)
    for name in _EMPTY_IN_BEAM_SEARCH:
        if getattr(request, name):
            _refuse_in_beam_search(name)


def _refuse_in_beam_search(name: str) -> None:
    raise InvalidArgumentError(f"{name} does not go with beam search (num_beams); leave it out", name)


def _beam_search(request: SamplingRequest) -> engine_pb2.BeamSearch:
    return engine_pb2.BeamSearch(
        num_beams=request.num_beams,
        length_penalty=request.length_penalty,
        early_stopping=request.early_stopping or HEURISTIC,  # type: ignore[arg-type]  # both enums have the same values
    )


def check_may_stream(samples: Samples, field: StreamField) -> None:
    """Raises InvalidArgumentError for outputs that are known only when all of them have ended."""
    if samples.beam_search is not None:
        message = f"{field.name}: the outputs of a beam search (num_beams) are known at its end; {field.remedy}"
        raise InvalidArgumentError(message, field.name)
    if samples.are_ranked:
        message = f"best_of ({samples.num_drawn}) over n ({samples.n}) cannot be streamed; {field.remedy}"
        raise InvalidArgumentError(message, "best_of")
