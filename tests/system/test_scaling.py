"""Groups come to a running server and leave it under 16 streams: no request fails or is refused, and each ends with the
tokens that it has where nothing happens. So it is where the coordinator is killed in the middle of such a change, which
goes on to its end under the next one."""

import os
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import grpc
import psutil
import pytest
from octavo.errors import FailedPreconditionError, UnavailableError
from octavo.launch.client import Client
from octavo.proto import admin_pb2

from .test_coordinator_deaths import coordinator_of, incarnation_of, wait_until_serving
from .test_rank_deaths import NUM_STREAMS, READY, ask, ask_all, check_same, request_of, running

pytestmark = pytest.mark.alone

NUM_PLACES = 4 * len(os.sched_getaffinity(0))  # of CPU ranks


@pytest.fixture(scope="module")
def server():
    with running("--max-restarts", "20") as server:
        yield server


@pytest.fixture(scope="module")
def expected(server):
    """What the first group alone answers."""
    return ask_all(server)


@pytest.fixture
def client(server):
    with Client(server.address) as client:
        yield client


def wait_until(condition, timeout_s=30.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


@contextmanager
def streams_without_end(server, expected):
    """16 clients, each of which asks its request again and again; all answers are what they should be."""
    is_over = threading.Event()

    def keep_asking(index):
        num_asked = 0
        while not is_over.is_set():
            check_same(index, ask(server, index), expected[index])
            num_asked += 1
        return num_asked

    before = server.counters()
    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        asking = [pool.submit(keep_asking, index) for index in range(NUM_STREAMS)]
        try:
            wait_until(lambda: sum(group.num_running for group in server.groups()) > NUM_STREAMS // 2)
            yield
        finally:
            is_over.set()
    assert sum(each.result() for each in asking) >= NUM_STREAMS
    after = server.counters()
    assert (after.num_failed, after.num_cancelled) == (before.num_failed, before.num_cancelled)
    assert all(group.num_free_blocks == group.num_blocks for group in server.groups())


def scale(client, *size):
    """What was said, and how long it took."""
    started = time.monotonic()
    news = list(client.scale(*size))
    assert news[-1].num_ready_groups == news[-1].num_groups
    return [each.message for each in news], time.monotonic() - started


def rank_processes(server):
    found = []
    for process in psutil.Process(server.process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # Ray's come and go
            if "RankActor" in " ".join(process.cmdline()):
                found.append(process)
    return found


def check_nothing_is_left_but(server, client, num_ranks):
    """No process, no port, no place in Ray."""
    wait_until(lambda: len(rank_processes(server)) == num_ranks, timeout_s=5)
    with pytest.raises(FailedPreconditionError, match="Ray has no room for 1000 group") as caught:
        scale(client, 1000)
    assert f" {NUM_PLACES - num_ranks} are free " in str(caught.value)


def test_groups_come_and_go_twice(server, expected, client):
    with streams_without_end(server, expected):
        for num_groups in (3, 2):
            said, up_s = scale(client, num_groups)
            assert [group.state for group in server.groups()] == [READY] * num_groups
            wait_until(lambda: all(group.num_running for group in server.groups()))
            _, down_s = scale(client, 1)
            assert [group.state for group in server.groups()] == [READY]
            loads = re.findall(r"took (\d\.\d) s to load", " ".join(said))
            print(f"1 to {num_groups} groups in {up_s:.1f} s, of which {loads} s loading, and back in {down_s:.1f} s")
    assert server.groups()[0].num_restarts == 0, server.lines
    check_nothing_is_left_but(server, client, num_ranks=1)


def test_groups_of_another_size_take_their_place(server, expected, client):
    with streams_without_end(server, expected):
        _, change_s = scale(client, 0, 2)
        print(f"from 1 rank to 2 in {change_s:.1f} s")
        [group] = server.groups()
        assert (group.state, len(group.ranks)) == (READY, 2)
        wait_until(lambda: server.groups()[0].num_running)
    check_nothing_is_left_but(server, client, num_ranks=2)
    scale(client, 1, 1)


def tokens_of(server, index) -> dict[int, list[int]]:
    """As those of `ask`, of blocks that no group has computed before."""
    request, tokens = request_of(index), {}
    request.cache_salt = "moves"
    for response in server.generation.Generate(request):
        for output in response.outputs:
            tokens.setdefault(output.index, []).extend(output.token_ids)
    return tokens


def has_blocks_to_copy(group) -> bool:
    return group.num_running >= 4 and group.blocks.num_used >= 3 * group.num_running


def test_what_moves_takes_its_blocks_along(server, expected, client):
    scale(client, 2)
    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        asked = [pool.submit(tokens_of, server, index) for index in range(NUM_STREAMS)]
        wait_until(lambda: all(has_blocks_to_copy(group) for group in server.groups()))
        scale(client, 1)
        [group] = server.groups()
        print(f"{group.block_counters.num_received_blocks} blocks came")
        assert group.block_counters.num_received_blocks > 0
        assert [each.result() for each in asked] == [outputs[0] for outputs, _ in expected]


def test_a_change_goes_on_without_its_caller_and_beside_no_other(server, client):
    num_lines = len(server.lines)  # other tests' changes were said, too
    news = client.scale(2)
    assert next(news).message == "starting 1 group(s) of 1 rank(s)"
    with pytest.raises(FailedPreconditionError, match=r"another change is under way, to 2 group\(s\) of 1 rank\(s\)"):
        scale(client, 1)
    news.close()
    wait_until(lambda: any("there are 2 group(s) of 1 rank(s) now" in line for line in server.lines[num_lines:]))
    scale(client, 1)


def test_a_group_that_does_not_start_changes_nothing(server, client):
    [old] = rank_processes(server)
    news = client.scale(3)
    next(news)
    wait_until(lambda: len(rank_processes(server)) > 1)
    [victim, *_] = [process for process in rank_processes(server) if process != old]
    victim.kill()
    with pytest.raises(UnavailableError):
        list(news)
    assert [group.state for group in server.groups()] == [READY]
    check_nothing_is_left_but(server, client, num_ranks=1)
    scale(client, 2)  # and may be tried again
    scale(client, 1)


def test_a_group_that_came_is_rebuilt_like_any_other(server, expected, client):
    scale(client, 2)
    newest = server.groups()[-1]
    with streams_without_end(server, expected):
        server.process_of(1, 0).kill()
        server.wait_until_noticed(1, newest.epoch, timeout_s=5)
        server.wait_until_whole(1)
    assert server.groups()[1].num_restarts == 1
    scale(client, 1)
    check_nothing_is_left_but(server, client, num_ranks=1)


@pytest.mark.parametrize(
    ("size", "code", "words"),
    [
        ((0, 0), grpc.StatusCode.INVALID_ARGUMENT, "give num_groups, tensor_parallel_size or both"),
        ((2000, 0), grpc.StatusCode.INVALID_ARGUMENT, "num_groups must be in [1, 1024], got 2000"),
        ((1, 3), grpc.StatusCode.INVALID_ARGUMENT, "tensor_parallel_size 3 does not split the model"),
        ((NUM_PLACES + 1, 0), grpc.StatusCode.FAILED_PRECONDITION, f"and {NUM_PLACES - 1} are free beside the 1 group"),
    ],
)
def test_what_cannot_be_is_refused_and_says_why(server, size, code, words):
    with pytest.raises(grpc.RpcError) as caught:
        list(server.admin.Scale(admin_pb2.ScaleRequest(num_groups=size[0], tensor_parallel_size=size[1])))
    assert caught.value.code() is code
    assert words in caught.value.details()
    assert [group.state for group in server.groups()] == [READY]


def kill_coordinator_at(server, state) -> None:
    def is_reached():
        with suppress(grpc.RpcError):
            return any(group.state == state for group in server.groups())
        return False

    victim = coordinator_of(server)
    wait_until(is_reached)
    victim.kill()


def change_and_kill(server, client, num_groups, state) -> list[str]:
    """What was said of a change during which the coordinator dies, while a group is in that state."""
    incarnation = incarnation_of(server)
    killing = threading.Thread(target=kill_coordinator_at, args=(server, state))
    killing.start()
    said = [news.message for news in client.scale(num_groups)]
    killing.join()
    assert said[-1].startswith(f"there are {num_groups} group(s) of 1 rank(s) now"), said
    wait_until_serving(server, incarnation + 1)
    assert len(server.groups()) == num_groups
    return said


def test_a_change_goes_on_under_the_next_coordinator(server, expected, client):
    """The last one: what the engine has counted goes with its process."""
    num_lines = len(server.lines)
    with streams_without_end(server, expected):
        said = change_and_kill(server, client, 2, admin_pb2.GROUP_STATE_STARTING)
        wait_until(lambda: all(group.num_running for group in server.groups()))
        said += change_and_kill(server, client, 1, admin_pb2.GROUP_STATE_DRAINING)
    print(said)
    check_nothing_is_left_but(server, client, num_ranks=1)
    lines = server.lines[num_lines:]
    assert not any("started rank" in line or "failed" in line for line in lines), lines
