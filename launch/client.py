"""A client of a running server, over gRPC: `Client("localhost:50051").generate("Once upon a time")`."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Self, TypeVar

import grpc

from ..errors import UnavailableError
from ..proto import admin_pb2, admin_pb2_grpc, generation_pb2, generation_pb2_grpc
from .config import DEFAULT_GRPC_PORT
from .outputs import RequestOutput, merge_outputs
from .prompts import AnyParams, ChatMessage, Prompt, RequestOptions, build_request, prompt_text, require_messages
from .rpc_errors import from_rpc_error
from .sampling_params import SamplingParams

T = TypeVar("T")

DEFAULT_ADDRESS = f"localhost:{DEFAULT_GRPC_PORT}"
CHANNEL_OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
_UNARY_TIMEOUT_S = 30.0


class Client:
    """One connection to an Octavo server; may be used by several threads. All methods raise OctavoError's kinds."""

    def __init__(
        self, address: str = DEFAULT_ADDRESS, *, timeout_s: float | None = None, connect_timeout_s: float = 5.0
    ) -> None:
        """`address` is "host:port" or "unix:/path". `timeout_s` bounds a whole generation, if given."""
        self._address = address
        self._timeout_s = timeout_s
        self._connect_timeout_s = connect_timeout_s
        self._has_connected = False
        self._channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._generation = generation_pb2_grpc.GenerationStub(self._channel)
        self._admin = admin_pb2_grpc.AdminStub(self._channel)

    def generate(
        self, prompt: Prompt, params: AnyParams | None = None, options: RequestOptions | None = None
    ) -> RequestOutput:
        """The whole output for one prompt: text, token ids or chat messages. With BeamSearchParams its outputs are the
        best beams."""
        options = replace(options or RequestOptions(), only_end=True)
        return merge_outputs(self.stream(prompt, params, options))

    def chat(
        self,
        messages: Sequence[ChatMessage],
        params: AnyParams | None = None,
        options: RequestOptions | None = None,
    ) -> RequestOutput:
        """The assistant's answer to a conversation, oldest message first."""
        require_messages(messages)
        return self.generate(messages, params, options)

    def stream(
        self, prompt: Prompt, params: AnyParams | None = None, options: RequestOptions | None = None
    ) -> Iterator[RequestOutput]:
        """Output as it comes: each carries what is new, of each sample that has news, told apart by their `index`.
        Closing the iterator early cancels the request."""
        request = build_request(prompt, params or SamplingParams(), options or RequestOptions())
        self._connect()
        call = self._generation.Generate(request, timeout=self._timeout_s)
        try:
            with self._translated_errors():
                for response in call:
                    yield RequestOutput.of(response, prompt_text(prompt))
        finally:
            call.cancel()

    def tokenize(self, prompt: str | Sequence[ChatMessage]) -> list[int]:
        """Token ids, exactly as `generate` would make them."""
        generate = build_request(prompt, SamplingParams(), RequestOptions())
        request = generation_pb2.TokenizeRequest()
        if isinstance(prompt, str):
            request.text = generate.text
        else:
            request.chat.CopyFrom(generate.chat)
        return list(self._unary(self._generation.Tokenize, request).token_ids)

    def detokenize(self, token_ids: Sequence[int]) -> str:
        request = generation_pb2.DetokenizeRequest(token_ids=token_ids)
        return str(self._unary(self._generation.Detokenize, request).text)

    def list_models(self) -> list[generation_pb2.Model]:
        """The names that requests may use, with their limits."""
        return list(self._unary(self._generation.ListModels, generation_pb2.ListModelsRequest()).models)

    def status(self) -> admin_pb2.GetStatusResponse:
        """Groups, ranks, blocks, queue and counters."""
        status: admin_pb2.GetStatusResponse = self._unary(self._admin.GetStatus, admin_pb2.GetStatusRequest())
        return status

    def scale(self, num_groups: int = 0, tensor_parallel_size: int = 0) -> Iterator[admin_pb2.ScaleProgress]:
        """Changes how many worker groups there are, or how many ranks each has (0: as now), while requests run.
        Progress until it is done; the change goes on without its caller."""
        self._connect()
        request = admin_pb2.ScaleRequest(num_groups=num_groups, tensor_parallel_size=tensor_parallel_size)
        with self._translated_errors():
            yield from self._admin.Scale(request)

    def _unary(self, method: Callable[..., T], request: object) -> T:
        self._connect()
        with self._translated_errors():
            return method(request, timeout=_UNARY_TIMEOUT_S)

    def _connect(self) -> None:
        """Before the first call: raises UnavailableError if nobody listens. Later gRPC connects again by itself."""
        if self._has_connected:
            return
        try:
            grpc.channel_ready_future(self._channel).result(timeout=self._connect_timeout_s)
        except grpc.FutureTimeoutError as error:
            raise UnavailableError(f"no server answers at {self._address}; is `octavo serve` running there?") from error
        self._has_connected = True

    @contextlib.contextmanager
    def _translated_errors(self) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            raise from_rpc_error(error, self._address) from error

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
