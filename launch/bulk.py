"""Many requests at once to one server: an event loop on a thread of its own, so that it works inside any program."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from ..errors import InvalidArgumentError
from ..proto import generation_pb2, generation_pb2_grpc
from .client import CHANNEL_OPTIONS
from .outputs import RequestOutput, merge_outputs
from .rpc_errors import from_rpc_error


@dataclass(frozen=True, slots=True)
class BulkRequest:
    """A request and the text to hand back with its output."""

    request: generation_pb2.GenerateRequest
    prompt: str | None


class BulkClient:
    """Owner of a thread, its event loop and a channel. `run` may be called by several threads."""

    def __init__(self, address: str, max_num_requests: int) -> None:
        """`max_num_requests` of a `run` are on their way at once; the others wait here."""
        self._address = address
        self._max_num_requests = max_num_requests
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="bulk client", daemon=True)
        self._thread.start()
        self._channel = self._submit(self._open()).result()

    async def _open(self) -> grpc.aio.Channel:
        return grpc.aio.insecure_channel(self._address, options=CHANNEL_OPTIONS)

    def _submit(self, coroutine: Coroutine[Any, Any, Any]) -> Any:  # noqa: ANN401 (a future of any result)
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def run(self, requests: Sequence[BulkRequest], on_done: Callable[[RequestOutput], None]) -> list[RequestOutput]:
        """Outputs in the order of `requests`; `on_done` is called for each as it ends, on another thread.

        The first request that fails cancels the others; raises its OctavoError. So does Ctrl-C.
        """
        running = self._submit(self._run_all(requests, on_done))
        try:
            outputs: list[RequestOutput] = running.result()
        except BaseException:
            running.cancel()
            raise
        return outputs

    async def _run_all(
        self, requests: Sequence[BulkRequest], on_done: Callable[[RequestOutput], None]
    ) -> list[RequestOutput]:
        stub = generation_pb2_grpc.GenerationStub(self._channel)
        room = asyncio.Semaphore(self._max_num_requests)

        async def run_one(index: int, request: BulkRequest) -> RequestOutput:
            async with room:
                try:
                    output = await self._run_one(stub, request)
                except InvalidArgumentError as error:
                    raise InvalidArgumentError(f"prompts[{index}]: {error}", error.field) from error
            on_done(output)
            return output

        tasks = [asyncio.ensure_future(run_one(index, request)) for index, request in enumerate(requests)]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _run_one(self, stub: generation_pb2_grpc.GenerationStub, request: BulkRequest) -> RequestOutput:
        call = stub.Generate(request.request)
        try:
            return merge_outputs([RequestOutput.of(response, request.prompt) async for response in call])
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, self._address) from error

    def detokenize(self, token_ids: Sequence[Sequence[int]]) -> list[str]:
        """The text of each sequence, special tokens too."""
        texts: list[str] = self._submit(self._detokenize_all(token_ids)).result()
        return texts

    async def _detokenize_all(self, token_ids: Sequence[Sequence[int]]) -> list[str]:
        stub = generation_pb2_grpc.GenerationStub(self._channel)
        requests = [generation_pb2.DetokenizeRequest(token_ids=ids) for ids in token_ids]
        try:
            return [response.text for response in await asyncio.gather(*map(stub.Detokenize, requests))]
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, self._address) from error

    def close(self) -> None:
        """Ends the channel and the thread."""
        self._submit(self._channel.close()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
