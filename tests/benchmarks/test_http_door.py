"""The load client's HTTP door, against a server that answers with canned bytes."""

import asyncio
import itertools

import pytest
from octavo.benchmarks.http_door import HttpDoor
from octavo.benchmarks.observation import Observation
from octavo.errors import InvalidArgumentError, UnavailableError

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
EVENTS = (
    b'data: {"choices":[{"text":" a"}],"usage":null}\n\n',
    b'data: {"choices":[{"text":" b","finish_reason":"length"}],"usage":null}\n\n',
    b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5}}\n\n',
    b"data: [DONE]\n\n",
)


def chunked(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def ask(pieces) -> Observation:
    """What the door notes of one request that is answered with these pieces, each sent by itself."""

    async def answer(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
        writer.close()

    async def run():
        ticks = itertools.count(1)
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            door = HttpDoor(f"http://127.0.0.1:{port}", "m", lambda: float(next(ticks)))
            observation = Observation(0.0)
            await door.generate([1, 2, 3], 2, observation)
            return observation

    return asyncio.run(run())


def test_notes_the_time_of_each_event_and_the_servers_count():
    observation = ask([HEAD, *map(chunked, EVENTS), b"0\r\n\r\n"])
    assert observation.event_times_s == [1.0, 2.0]
    assert (observation.num_tokens, observation.ttft_s, observation.gaps_s) == (2, 1.0, [1.0])


def test_events_may_be_cut_anywhere_or_come_together():
    whole = HEAD + b"".join(chunked(event) for event in EVENTS) + b"0\r\n\r\n"
    for pieces in ([whole], [whole[i : i + 7] for i in range(0, len(whole), 7)]):
        observation = ask(pieces)
        assert (len(observation.event_times_s), observation.num_tokens) == (2, 2)


def test_a_refusal_carries_what_the_server_said():
    body = b'{"error":{"message":"max_tokens is too large"}}'
    head = f"HTTP/1.1 400 Bad Request\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    with pytest.raises(UnavailableError, match=r"HTTP 400: .*max_tokens is too large"):
        ask([head + body])


def test_an_error_event_fails_the_request():
    failed = b'data: {"error":{"message":"the workers failed"}}\n\n'
    with pytest.raises(UnavailableError, match="the workers failed"):
        ask([HEAD, chunked(EVENTS[0]), chunked(failed), b"0\r\n\r\n"])


def test_a_broken_connection_fails_the_request():
    with pytest.raises(UnavailableError, match="closed the connection early"):
        ask([HEAD, chunked(EVENTS[0])])


def test_nobody_at_home():
    door = HttpDoor("http://127.0.0.1:9", "m", lambda: 0.0)
    with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:9 does not answer"):
        asyncio.run(door.generate([1], 1, Observation(0.0)))


@pytest.mark.parametrize("url", ["localhost:8000", "https://localhost", "http://localhost/v1"])
def test_other_urls_are_refused(url):
    with pytest.raises(InvalidArgumentError, match="base_url must be http://HOST:PORT"):
        HttpDoor(url, "m", lambda: 0.0)
