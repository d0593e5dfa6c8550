"""Answers a message that is no protobuf with INVALID_ARGUMENT; grpc.aio by itself would say UNKNOWN and show its
exception."""

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from ..errors import InvalidArgumentError
from .errors import to_grpc_status

_Behavior = Callable[[Any, grpc.aio.ServicerContext], Awaitable[Any]]


class _Malformed:
    """Stands for a request that could not be read."""


class MalformedRequestInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Wraps the methods with one request; a streaming one (reflection, health) is the library's own affair."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming:
            return handler
        deserialize = _tolerant(handler.request_deserializer)
        if handler.response_streaming:
            behavior = _refusing(handler.unary_stream)
            return grpc.unary_stream_rpc_method_handler(behavior, deserialize, handler.response_serializer)
        behavior = _refusing(handler.unary_unary)
        return grpc.unary_unary_rpc_method_handler(behavior, deserialize, handler.response_serializer)


def _tolerant(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def deserialize_or_mark(data: bytes) -> Any:  # noqa: ANN401 - a message of any method
        try:
            return deserialize(data)
        except DecodeError:
            return _Malformed()

    return deserialize_or_mark


def _refusing(behavior: _Behavior) -> _Behavior:
    async def refuse_malformed(request: Any, context: grpc.aio.ServicerContext) -> Any:  # noqa: ANN401
        if isinstance(request, _Malformed):
            error = InvalidArgumentError("the message is not the protobuf message of this method")
            await context.abort_with_status(to_grpc_status(error))
        return await behavior(request, context)

    return refuse_malformed
