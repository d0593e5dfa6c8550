"""The one error tree. Each class is a kind of cause; gateway/errors.py turns kinds into gRPC and HTTP codes.

Every folder may import this module; it imports nothing. Messages are written for the person who can act on them: they
name the cause and the remedy, and never carry another library's exception text to a client.
"""


class OctavoError(Exception):
    """Base of every error that Octavo raises on purpose."""


class InvalidArgumentError(OctavoError):
    """The caller's input is wrong. `field` names the offending parameter, if there is one."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class NotFoundError(OctavoError):
    """What the caller named does not exist: a model, a file."""


class ResourceExhaustedError(OctavoError):
    """A bound is reached. `retry_after_s` says when to try again, if that can help."""

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class FailedPreconditionError(OctavoError):
    """The system is not in the state that the call needs: a stale plan, a port in use."""


class UnavailableError(OctavoError):
    """The service cannot answer now; the same call may succeed later."""


class InternalError(OctavoError):
    """A fault of ours."""


class CheckpointError(OctavoError):
    """A model directory that cannot be served: missing, extra or wrongly shaped tensors, an unsupported format."""
