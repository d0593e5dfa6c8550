"""The one place where kinds of errors become gRPC statuses and HTTP answers in OpenAI's shape.

An error that is not an OctavoError is a fault of ours: the client hears only that, the log has the traceback.
"""

import logging
import math
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from ..errors import (
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    OctavoError,
    ResourceExhaustedError,
    UnavailableError,
)

logger = logging.getLogger(__name__)

_GENERIC_MESSAGE = "internal error; the server's log has more"


class PayloadTooLargeError(InvalidArgumentError):
    """A body over the HTTP door's bound; gRPC refuses such messages itself."""


class UnknownModelError(NotFoundError):
    """A request names a model that is not served."""


class RequestFailedError(InternalError):
    """A fault of ours that ended one request, in words of the coordinator that are meant for the client."""


@dataclass(frozen=True, slots=True)
class _Kind:
    """How one class of errors looks from outside."""

    grpc_code: int  # google.rpc.Code
    http_status: int
    openai_type: str
    openai_code: str | None = None


_INTERNAL = _Kind(code_pb2.INTERNAL, 500, "server_error", "internal_error")
_KINDS: dict[type[OctavoError], _Kind] = {
    PayloadTooLargeError: _Kind(code_pb2.INVALID_ARGUMENT, 413, "invalid_request_error", "payload_too_large"),
    InvalidArgumentError: _Kind(code_pb2.INVALID_ARGUMENT, 400, "invalid_request_error"),
    UnknownModelError: _Kind(code_pb2.NOT_FOUND, 404, "invalid_request_error", "model_not_found"),
    NotFoundError: _Kind(code_pb2.NOT_FOUND, 404, "invalid_request_error", "not_found"),
    ResourceExhaustedError: _Kind(code_pb2.RESOURCE_EXHAUSTED, 429, "rate_limit_error", "resource_exhausted"),
    FailedPreconditionError: _Kind(code_pb2.FAILED_PRECONDITION, 409, "conflict_error", "failed_precondition"),
    UnavailableError: _Kind(code_pb2.UNAVAILABLE, 503, "service_unavailable_error", "unavailable"),
    RequestFailedError: _Kind(code_pb2.INTERNAL, 500, "server_error", "request_failed"),
}


@dataclass(frozen=True, slots=True)
class HttpError:
    """An HTTP answer: status, OpenAI's error object, headers."""

    status: int
    body: dict[str, Any]
    headers: dict[str, str]


def _kind(error: BaseException) -> _Kind:
    for cls in type(error).__mro__:
        if cls in _KINDS:
            return _KINDS[cls]
    return _INTERNAL


def _public_message(error: BaseException) -> str:
    """What the client may read. Logs a fault of ours with its traceback."""
    if _kind(error) is not _INTERNAL:
        return str(error)
    logger.error("a request failed by a fault of ours", exc_info=error)
    return _GENERIC_MESSAGE


def to_grpc_status(error: BaseException) -> grpc.Status:
    """The grpc.Status of `error`, with BadRequest naming the field or RetryInfo as google.rpc details."""
    status = status_pb2.Status(code=_kind(error).grpc_code, message=_public_message(error))
    if isinstance(error, InvalidArgumentError) and error.field is not None:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=str(error))
        _attach(status, error_details_pb2.BadRequest(field_violations=[violation]))
    if (retry_after_s := _retry_after_s(error)) is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(round(retry_after_s * 1e9))
        _attach(status, error_details_pb2.RetryInfo(retry_delay=delay))
    return rpc_status.to_status(status)


def _attach(status: status_pb2.Status, detail: Message) -> None:
    packed = any_pb2.Any()
    packed.Pack(detail)
    status.details.append(packed)


def to_http_error(error: BaseException) -> HttpError:
    """The HTTP status and OpenAI error object of `error`; Retry-After in whole seconds where it is known."""
    kind = _kind(error)
    body = {"message": _public_message(error), "type": kind.openai_type, "param": _param(error)}
    body["code"] = kind.openai_code
    headers = {}
    if (retry_after_s := _retry_after_s(error)) is not None:
        headers["Retry-After"] = str(max(1, math.ceil(retry_after_s)))
    return HttpError(kind.http_status, {"error": body}, headers)


def _retry_after_s(error: BaseException) -> float | None:
    return error.retry_after_s if isinstance(error, ResourceExhaustedError | UnavailableError) else None


def _param(error: BaseException) -> str | None:
    if isinstance(error, UnknownModelError):
        return "model"
    return error.field if isinstance(error, InvalidArgumentError) else None


def from_engine_failure(code: int, message: str, retry_after_s: float, field: str) -> OctavoError:
    """The error of a google.rpc.Code that the coordinator sent with its message for the client."""
    if code == code_pb2.INVALID_ARGUMENT:
        return InvalidArgumentError(message, field or None)
    if code == code_pb2.NOT_FOUND:
        return NotFoundError(message)
    if code == code_pb2.RESOURCE_EXHAUSTED:
        return ResourceExhaustedError(message, retry_after_s or None)
    if code == code_pb2.FAILED_PRECONDITION:
        return FailedPreconditionError(message)
    if code == code_pb2.UNAVAILABLE:
        return UnavailableError(message)
    if code == code_pb2.INTERNAL:
        return RequestFailedError(message)
    return InternalError(f"the coordinator failed a request with code {code}: {message}")


def raise_from_rpc(error: grpc.aio.AioRpcError, doing: str) -> NoReturn:
    """Raises the OctavoError for a failed call to the coordinator; its text goes to the log only.

    Raises: UnavailableError when the coordinator cannot be reached, InternalError otherwise.
    """
    if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED):
        raise UnavailableError(f"{doing}: the coordinator does not answer; try again") from error
    raise InternalError(f"{doing}: {error.code().name}: {error.details()}") from error
