"""A request as the engine takes it: the first time, and again where a session broke in the middle of it."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..proto import engine_pb2, sampling_pb2


@dataclass(frozen=True, slots=True)
class Submission:
    """Fields as those of engine_pb2.Submit."""

    prompt_token_ids: bytes  # packed int32
    sampling_params: sampling_pb2.SamplingParams
    priority: int = 0
    num_samples: int = 1
    cache_salt: bytes = b""
    beam_search: engine_pb2.BeamSearch | None = None

    def message(self, handle: int, resumed: Sequence[engine_pb2.ResumedOutput] = ()) -> engine_pb2.Submit:
        """`resumed`: what was received of the open outputs, if the request was sent before."""
        return engine_pb2.Submit(
            handle=handle,
            prompt_token_ids=self.prompt_token_ids,
            sampling_params=self.sampling_params,
            priority=self.priority,
            num_samples=self.num_samples,
            cache_salt=self.cache_salt,
            beam_search=self.beam_search,
            resumed=resumed,
        )
