"""The requests of a load: a pool of distinct ones, of every kind whose state must survive a move to other workers."""

import random
from collections.abc import Mapping
from typing import Any

from ...errors import InvalidArgumentError
from ...proto import generation_pb2

_OUTPUT_LENS = (16, 160)
_PROMPT_LENS = (4, 96)
_LONG_PROMPT_LENS = (300, 700)
_BEAM_TOKENS = 48
# Fields of SamplingParams, of each kind in turn.
_KINDS: tuple[Mapping[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.8, "presence_penalty": 0.6, "frequency_penalty": 0.3, "repetition_penalty": 1.2},
    {"temperature": 1.0, "top_p": 0.9, "logprobs": 3},
    {"temperature": 1.0, "n": 3},
    {"temperature": 1.0, "stop": ["ou", "??"], "ignore_eos": False},
    {"temperature": 0.7, "top_k": 20, "min_p": 0.02, "prompt_logprobs": 1},
    {"temperature": 0.0, "num_beams": 3, "n": 2},
)
LONGEST = _LONG_PROMPT_LENS[1] + _OUTPUT_LENS[1]  # tokens of the longest request
NUM_KINDS = len(_KINDS)


def make_requests(num_requests: int, vocab_size: int, seed: int) -> list[generation_pb2.GenerateRequest]:
    """The same for the same seed. Every fourth one of a kind has a long prompt."""
    if num_requests < 1:
        raise InvalidArgumentError(f"a load needs at least 1 request, got {num_requests}", "num_requests")
    rng = random.Random(seed)  # noqa: S311 (no secret)
    return [_make_request(index, vocab_size, rng) for index in range(num_requests)]


def _make_request(index: int, vocab_size: int, rng: random.Random) -> generation_pb2.GenerateRequest:
    kind, turn = _KINDS[index % NUM_KINDS], index // NUM_KINDS
    num_tokens = rng.randint(*(_LONG_PROMPT_LENS if turn % 4 == 3 else _PROMPT_LENS))
    fields: dict[str, Any] = {"max_tokens": rng.randint(*_OUTPUT_LENS), "ignore_eos": True, **kind}
    mode = generation_pb2.OUTPUT_MODE_DELTA
    if "num_beams" in kind:
        fields["max_tokens"] = min(fields["max_tokens"], _BEAM_TOKENS)
        mode = generation_pb2.OUTPUT_MODE_FINAL
    else:
        fields["seed"] = rng.getrandbits(32)
    return generation_pb2.GenerateRequest(
        token_ids=generation_pb2.TokenIds(ids=[rng.randrange(3, vocab_size) for _ in range(num_tokens)]),
        sampling_params=generation_pb2.SamplingParams(**fields),
        output_mode=mode,
    )
