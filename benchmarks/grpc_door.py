"""octavo.v1.Generation, streamed, all requests on one channel."""

from collections.abc import Sequence

import grpc

from ..errors import UnavailableError
from ..proto import generation_pb2, generation_pb2_grpc
from .observation import Clock, Observation


def generate_request(
    prompt: Sequence[int], output_len: int, model: str = "", only_end: bool = False
) -> generation_pb2.GenerateRequest:
    """Temperature 1 and no early end."""
    mode = generation_pb2.OUTPUT_MODE_FINAL if only_end else generation_pb2.OUTPUT_MODE_DELTA
    return generation_pb2.GenerateRequest(
        model=model,
        token_ids=generation_pb2.TokenIds(ids=prompt),
        sampling_params=generation_pb2.SamplingParams(temperature=1.0, max_tokens=output_len, ignore_eos=True),
        output_mode=mode,
    )


class GrpcDoor:
    """Asks one server."""

    def __init__(self, address: str, model: str, now: Clock) -> None:
        self._channel = grpc.aio.insecure_channel(address)
        self._stub = generation_pb2_grpc.GenerationStub(self._channel)
        self._model = model
        self._now = now

    async def generate(self, prompt: Sequence[int], output_len: int, observation: Observation) -> None:
        """Streams one request into `observation`. Raises UnavailableError if it is refused or breaks off."""
        try:
            async for response in self._stub.Generate(generate_request(prompt, output_len, self._model)):
                if response.outputs:
                    observation.event_times_s.append(self._now())
                if response.HasField("usage"):
                    observation.num_tokens = response.usage.completion_tokens
        except grpc.aio.AioRpcError as error:
            raise UnavailableError(f"{error.code().name}: {error.details()}") from error

    async def close(self) -> None:
        await self._channel.close()
