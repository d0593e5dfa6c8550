"""Ports for servers that a test starts."""

import random
import socket

# Below those that Linux gives to whoever asks for any: between its choice here and its use by a server, seconds later,
# no process of any server, Ray's own among them, is given it.
_FIRST, _LAST = 20_000, 32_000


def free_port() -> int:
    while True:
        port = random.SystemRandom().randint(_FIRST, _LAST)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port
