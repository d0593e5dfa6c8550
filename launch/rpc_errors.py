"""gRPC statuses back to the one error tree: the inverse of gateway/errors.py, for clients."""

import grpc
from google.rpc import error_details_pb2, status_pb2
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


def from_rpc_error(error: grpc.RpcError, address: str) -> OctavoError:
    """The OctavoError of a failed call to the server at `address`."""
    status = rpc_status.from_call(error)
    if status is None:  # not from Octavo: the connection, the deadline, or another server
        return _transport_error(error, address)
    return _own_error(error.code(), status)


def _own_error(code: grpc.StatusCode, status: status_pb2.Status) -> OctavoError:
    message = status.message
    if code == grpc.StatusCode.INVALID_ARGUMENT:
        return InvalidArgumentError(message, _field(status))
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
        return ResourceExhaustedError(message, _retry_after_s(status))
    if code == grpc.StatusCode.UNAVAILABLE:
        return UnavailableError(message, _retry_after_s(status))
    kinds: dict[grpc.StatusCode, type[OctavoError]] = {
        grpc.StatusCode.NOT_FOUND: NotFoundError,
        grpc.StatusCode.FAILED_PRECONDITION: FailedPreconditionError,
    }
    return kinds.get(code, InternalError)(message)


def _transport_error(error: grpc.RpcError, address: str) -> OctavoError:
    code = error.code()
    details = " ".join(str(error.details()).split())
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        return UnavailableError(f"the server at {address} did not answer in time")
    if code == grpc.StatusCode.UNIMPLEMENTED:
        return FailedPreconditionError(f"the server at {address} is no Octavo server, or another version: {details}")
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED:  # gRPC's own bound on message sizes
        return ResourceExhaustedError(f"the message is too large for the server at {address}: {details}")
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
        return UnavailableError(f"the connection to {address} broke: {details}")
    return InternalError(f"the call to {address} failed with {code.name}: {details}")


def _field(status: status_pb2.Status) -> str | None:
    for detail in status.details:
        request = error_details_pb2.BadRequest()
        if detail.Unpack(request) and request.field_violations:
            return str(request.field_violations[0].field)
    return None


def _retry_after_s(status: status_pb2.Status) -> float | None:
    for detail in status.details:
        retry = error_details_pb2.RetryInfo()
        if detail.Unpack(retry):
            return float(retry.retry_delay.ToTimedelta().total_seconds())
    return None
