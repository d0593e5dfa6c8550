"""What a call to a rank ends with when it fails."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import NoReturn

import grpc

from ..errors import OctavoError
from .rendezvous import is_lost_peer

_log = logging.getLogger(__name__)

_STATUS_CODES = {code.value[0]: code for code in grpc.StatusCode}


@contextlib.asynccontextmanager
async def status_for_errors(context: grpc.aio.ServicerContext) -> AsyncIterator[None]:
    """An OctavoError ends the call with its code and text; another with INTERNAL, and its traceback stays here."""
    try:
        yield
    except grpc.aio.AbortError:
        raise
    except grpc.aio.InternalError:  # the call ended under an answer
        raise asyncio.CancelledError from None
    except Exception as error:
        await abort(context, *status_of(error))


def status_of(error: Exception) -> tuple[grpc.StatusCode, str]:
    if isinstance(error, OctavoError):
        return _STATUS_CODES[error.grpc_code], str(error)
    if is_lost_peer(error):
        return grpc.StatusCode.UNAVAILABLE, "the connection to another rank of the group is lost"
    _log.error("a call failed by a fault of ours", exc_info=error)
    return grpc.StatusCode.INTERNAL, f"{type(error).__name__}; the worker's log has more"


async def abort(context: grpc.aio.ServicerContext, code: grpc.StatusCode, details: str) -> NoReturn:
    """A caller that has gone hears nothing, which is no news."""
    try:
        await context.abort(code, details)
    except grpc.aio.InternalError:
        raise asyncio.CancelledError from None
    raise AssertionError("abort raises")
