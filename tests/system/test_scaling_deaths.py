"""The coordinator is killed in the middle of a change of scale, under 32 streams: the change goes on to its end under
the next one, no request fails or is refused, and each ends with the tokens that it has where nothing happens."""

from contextlib import suppress
from threading import Thread

import grpc
import pytest
from octavo.launch.client import Client
from octavo.proto import admin_pb2

from .test_coordinator_deaths import coordinator_of, incarnation_of, wait_until_serving
from .test_rank_deaths import ask_all, running
from .test_scaling import check_nothing_is_left_but, rank_processes, streams_without_end, wait_until

pytestmark = pytest.mark.alone

STARTING, DRAINING = admin_pb2.GROUP_STATE_STARTING, admin_pb2.GROUP_STATE_DRAINING


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
    killing = Thread(target=kill_coordinator_at, args=(server, state))
    killing.start()
    said = [news.message for news in client.scale(num_groups)]
    killing.join()
    assert said[-1].startswith(f"there are {num_groups} group(s) of 1 rank(s) now"), said
    wait_until_serving(server, incarnation + 1)
    assert len(server.groups()) == num_groups
    return said


def test_a_change_goes_on_under_the_next_coordinator():
    with running("--max-restarts", "20") as server, Client(server.address) as client:
        expected = ask_all(server)
        ranks = {process.pid for process in rank_processes(server)}
        with streams_without_end(server, expected):
            said = change_and_kill(server, client, 2, STARTING)
            wait_until(lambda: all(group.num_running for group in server.groups()))
            said += change_and_kill(server, client, 1, DRAINING)
        print(said)
        assert len(ranks & {process.pid for process in rank_processes(server)}) <= 1
        check_nothing_is_left_but(server, client, num_ranks=1)
        assert not any("started rank" in line or "failed" in line for line in server.lines), server.lines
