"""The one error tree. Each class is a kind of cause; gateway/errors.py turns kinds into gRPC and HTTP codes.

Every folder may import this module; it imports nothing. Messages are written for the person who can act on them: they
name the cause and the remedy, and never carry another library's exception text to a client.
"""

from typing import ClassVar


class OctavoError(Exception):
    """Base of every error that Octavo raises on purpose. Each kind is one google.rpc.Code on every wire."""

    grpc_code: ClassVar[int] = 13  # INTERNAL


class InvalidArgumentError(OctavoError):
    """The caller's input is wrong. `field` names the offending parameter, if there is one."""

    grpc_code = 3  # INVALID_ARGUMENT

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class NotFoundError(OctavoError):
    """What the caller named does not exist: a model, a file."""

    grpc_code = 5  # NOT_FOUND


class ResourceExhaustedError(OctavoError):
    """A bound is reached. `retry_after_s` says when to try again, if that can help."""

    grpc_code = 8  # RESOURCE_EXHAUSTED

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class FailedPreconditionError(OctavoError):
    """The system is not in the state that the call needs: a stale plan, a port in use."""

    grpc_code = 9  # FAILED_PRECONDITION


class UnavailableError(OctavoError):
    """The service cannot answer now; the same call may succeed later: after `retry_after_s`, if that is known."""

    grpc_code = 14  # UNAVAILABLE

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class InternalError(OctavoError):
    """A fault of ours."""


class CheckpointError(OctavoError):
    """A model directory that cannot be served: missing, extra or wrongly shaped tensors, an unsupported format."""

    grpc_code = 9  # FAILED_PRECONDITION
