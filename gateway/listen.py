"""Ports that several gateways share."""

import socket

from ..errors import FailedPreconditionError


def shared_socket(host: str, port: int, option: str) -> socket.socket:
    """A bound TCP socket of a port that other gateways may bind too; the kernel spreads connections over them.

    Raises FailedPreconditionError, which names the command line's `option`, if another program has the port.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        message = f"cannot listen on {host}:{port}: {error.strerror}; choose another --host or {option}"
        raise FailedPreconditionError(message) from error
    sock.setblocking(False)
    return sock
