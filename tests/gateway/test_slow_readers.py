"""Clients that do not read their streams, over real sockets: they are ended, and nobody else notices."""

import json
import socket
import time
from contextlib import ExitStack

import grpc
import pytest
from octavo.gateway import engine_client, grpc_service, slow_readers
from octavo.proto import generation_pb2_grpc
from octavo.proto.generation_pb2 import GenerateRequest, SamplingParams, TokenIds

from .fake_engine import LENGTH, LETTER_A, Answer

MANY = 400_000  # tokens: more than all buffers and bounds take
SOME = 100_000  # more than all buffers take


def speaks(gateway, num_tokens, hold_after=None):
    gateway.engine.answer = Answer([LETTER_A] * num_tokens, LENGTH, tokens_per_message=50, hold_after=hold_after)


@pytest.fixture
def own(start_gateway):
    with start_gateway(max_model_len=1 << 20, shutdown_timeout_s=60) as gateway:
        yield gateway


@pytest.fixture
def impatient(monkeypatch):
    """Only time counts, and that soon."""
    monkeypatch.setattr(slow_readers, "MAX_WRITE_S", 0.3)
    monkeypatch.setattr(engine_client, "MAX_UNREAD", MANY)


@pytest.fixture
def channel(own):
    """Of a client whose windows keep their first size, 64 KiB; by default they grow to some MB of its memory."""
    options = [("grpc.http2.bdp_probe", 0), ("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(f"{own.settings.host}:{own.settings.grpc_port}", options) as channel:
        yield channel


def start_grpc(channel):
    """A call whose first token has come."""
    request = GenerateRequest(token_ids=TokenIds(ids=[7]), sampling_params=SamplingParams(max_tokens=MANY))
    call = generation_pb2_grpc.GenerationStub(channel).Generate(request)
    next(call)
    return call


def start_http(gateway):
    """A connection, with a small receive buffer, that has asked for a stream and got the beginning of its headers."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(10)
    client.connect((gateway.settings.host, gateway.settings.http_port))
    body = json.dumps({"prompt": [7], "stream": True, "max_tokens": MANY}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    client.sendall(head.encode() + b"\r\n\r\n" + body)
    assert client.recv(9) == b"HTTP/1.1 "
    return client


def read_to_end(client) -> bytes:
    pieces = []
    while piece := client.recv(1 << 16):
        pieces.append(piece)
    return b"".join(pieces)


def only_cancel(gateway, handle):
    return lambda: gateway.engine.cancels == [handle]


def test_a_grpc_client_that_leaves_much_unread(own, channel, eventually):
    """Its tokens are no longer computed while it still does nothing; what it then reads ends with the reason."""
    speaks(own, MANY)
    call = start_grpc(channel)
    eventually(only_cancel(own, own.engine.submits[0].handle), timeout_s=30)
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "does not read" in caught.value.details()


def test_an_http_client_that_leaves_much_unread(own, eventually):
    speaks(own, MANY)
    with start_http(own) as client:
        eventually(only_cancel(own, own.engine.submits[0].handle), timeout_s=30)
        rest = b""
        while b"[DONE]" not in rest:
            rest = rest[-1000:] + client.recv(1 << 16)
        assert b'"code":"resource_exhausted"' in rest


def test_a_grpc_client_that_lets_a_write_wait(own, channel, impatient):
    speaks(own, SOME)
    call = start_grpc(channel)
    time.sleep(1.5)
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_an_http_client_that_lets_a_write_wait(own, impatient):
    """The error stands at the end of what it reads when it reads at last, and the connection is closed."""
    speaks(own, SOME)
    with start_http(own) as client:
        time.sleep(1.5)
        text = read_to_end(client).decode()
    assert '"code":"resource_exhausted"' in text[-400:]
    assert text.endswith("data: [DONE]\n\n\r\n0\r\n\r\n")


def test_clients_that_never_read_are_broken_off(own, channel, loop, impatient, monkeypatch):
    """Else the gateway, which has a minute for what runs, would not end."""
    monkeypatch.setattr(slow_readers, "LINGER_S", 0.3)
    monkeypatch.setattr(grpc_service, "LINGER_S", 0.3)
    speaks(own, SOME)
    call = start_grpc(channel)
    with start_http(own) as client:
        time.sleep(1.5)
        with pytest.raises(ConnectionResetError):
            read_to_end(client)
        loop.call(own.gateway.stop)
        own.running.result(timeout=5)
    with pytest.raises(grpc.RpcError):
        list(call)


def test_others_are_served_beside_clients_that_do_not_read(own, channel, eventually):
    """Six of them, each with all its buffers full; a stream that comes then has its tokens at once."""
    speaks(own, SOME, hold_after=SOME - 50)
    calls = [start_grpc(channel) for _ in range(3)]
    with ExitStack() as clients:
        for _ in range(3):
            clients.enter_context(start_http(own))
        eventually(lambda: len(own.engine.cancels) == 6, timeout_s=30)
        speaks(own, 2000)
        started = time.monotonic()
        assert sum(len(response.outputs[0].token_ids) for response in start_grpc(own.channel)) == 1950
        assert time.monotonic() - started < 2
        for call in calls:
            call.cancel()
