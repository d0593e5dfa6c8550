"""What a request was answered, put together as it comes, and how two answers to the same request differ. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

from ...proto import generation_pb2

_LOGPROB_TOLERANCE = 1e-3  # float32, sums in another order
_PROOF_TOKENS = 8  # that must go on alike before tokens count as missing or repeated and not as wrong
_MAX_SHIFT = 64


@dataclass(frozen=True, slots=True)
class Difference:
    """Between what an output should be and what it is."""

    kind: str  # missing, repeated or wrong tokens; text, ending, logprobs
    output: int
    position: int  # of the first token that differs
    count: int  # tokens

    def __str__(self) -> str:
        return f"output {self.output}: {self.count} {self.kind} at token {self.position}"


@dataclass(slots=True)
class Output:
    """One sample or beam."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    ending: int = generation_pb2.FINISH_REASON_UNSPECIFIED
    logprobs: list[float] = field(default_factory=list)  # of token_ids, when asked for


@dataclass(slots=True)
class Answer:
    """All that came."""

    outputs: dict[int, Output] = field(default_factory=dict)
    prompt_logprobs: list[float] = field(default_factory=list)

    def take(self, response: generation_pb2.GenerateResponse) -> int:
        """Adds what a response brings; how many tokens that is."""
        self.prompt_logprobs += [entry.token.logprob for entry in response.prompt_logprobs]
        for piece in response.outputs:
            output = self.outputs.setdefault(piece.index, Output())
            output.token_ids += piece.token_ids
            output.text += piece.text
            output.ending = piece.finish_reason
            output.logprobs += [entry.token.logprob for entry in piece.logprobs]
        return sum(len(piece.token_ids) for piece in response.outputs)

    @property
    def num_tokens(self) -> int:
        return sum(len(output.token_ids) for output in self.outputs.values())

    def goes_like(self, expected: "Answer", piece: generation_pb2.SequenceOutput) -> bool:
        """Whether a piece that was just taken has the tokens that are due there."""
        end = len(self.outputs[piece.index].token_ids)
        due = expected.outputs.get(piece.index, Output()).token_ids[end - len(piece.token_ids) : end]
        return due == list(piece.token_ids)


def differences(expected: Answer, found: Answer) -> list[Difference]:
    """At most one for each output."""
    compared = [
        _compare_outputs(index, expected.outputs.get(index, Output()), found.outputs.get(index, Output()))
        for index in sorted({*expected.outputs, *found.outputs})
    ]
    if not _are_close(expected.prompt_logprobs, found.prompt_logprobs):
        compared.append(Difference("logprobs", 0, 0, 0))
    return [difference for difference in compared if difference is not None]


def _compare_outputs(index: int, expected: Output, found: Output) -> Difference | None:
    if (tokens := compare_tokens(index, expected.token_ids, found.token_ids)) is not None:
        return tokens
    end = len(found.token_ids)
    if found.text != expected.text:
        return Difference("text", index, end, 0)
    if found.ending != expected.ending:
        return Difference("ending", index, end, 0)
    if not _are_close(expected.logprobs, found.logprobs):
        return Difference("logprobs", index, end, 0)
    return None


def compare_tokens(output: int, expected: Sequence[int], found: Sequence[int]) -> Difference | None:
    """Where the tokens part, and how. After tokens were lost or came twice the rest goes on as it should."""
    if list(expected) == list(found):
        return None
    position = next(at for at, (a, b) in enumerate(zip_longest(expected, found)) if a != b)
    rest = list(found[position:])
    if not rest:
        return Difference("missing", output, position, len(expected) - position)
    for shift in range(1, _MAX_SHIFT):
        if _goes_on(rest, expected[position + shift :]):
            return Difference("missing", output, position, shift)
        if shift <= position and _goes_on(rest, expected[position - shift :]):
            return Difference("repeated", output, position, shift)
    return Difference("wrong", output, position, sum(a != b for a, b in zip_longest(expected[position:], rest)))


def _goes_on(rest: Sequence[int], due: Sequence[int]) -> bool:
    """Whether `rest` begins as `due` does, as far as both go."""
    num_compared = min(len(rest), len(due), _PROOF_TOKENS)
    return num_compared > 0 and list(rest[:num_compared]) == list(due[:num_compared])


def _are_close(expected: Sequence[float], found: Sequence[float]) -> bool:
    return len(expected) == len(found) and all(
        abs(a - b) <= _LOGPROB_TOLERANCE for a, b in zip(expected, found, strict=True)
    )
