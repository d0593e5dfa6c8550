"""Ranks of a server with spare processes are killed under streams: a spare takes the place, and another one follows."""

import re
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from octavo.proto import admin_pb2, generation_pb2

from .test_rank_deaths import READY, running

pytestmark = pytest.mark.alone

NUM_STREAMS = 8
MANY_TOKENS, FEW_TOKENS = 400, 160  # a stream's: longer than a group takes to come, and than a rank takes to be killed
SPARE_TIMEOUT_S = 60


def ask(server, index: int, num_tokens: int) -> list[int]:
    request = generation_pb2.GenerateRequest(
        text=f"Once upon a time there were {index} foxes",
        sampling_params=generation_pb2.SamplingParams(
            temperature=1.0, seed=index, max_tokens=num_tokens, ignore_eos=True
        ),
    )
    return [token for r in server.generation.Generate(request) for output in r.outputs for token in output.token_ids]


def ask_all(server, num_tokens: int = MANY_TOKENS) -> list[list[int]]:
    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        return list(pool.map(lambda index: ask(server, index, num_tokens), range(NUM_STREAMS)))


def rank_processes(server, group: int = 0) -> dict[int, psutil.Process]:
    """By rank."""
    return {rank: server.process_of(group, rank) for rank in range(len(server.groups()[group].ranks))}


def wait_for_spare(server, not_one_of=()) -> psutil.Process:
    """A process that is no rank, and has imported what one needs."""
    deadline = time.monotonic() + SPARE_TIMEOUT_S
    while True:
        ranks = rank_processes(server).values()
        for process in psutil.Process(server.process.pid).children(recursive=True):
            if process not in ranks and process not in not_one_of and is_prepared(process):
                return process
        assert time.monotonic() < deadline, server.lines
        time.sleep(0.1)


def is_prepared(process: psutil.Process) -> bool:
    """Ray names it after what it does: it is idle once it has its imports."""
    try:
        return process.cmdline()[0] == "ray::RankActor" and "torch" in " ".join(m.path for m in process.memory_maps())
    except (psutil.NoSuchProcess, IndexError):
        return False


@pytest.fixture(scope="module")
def server():
    with running("--tensor-parallel-size", "2", "--dtype", "float32", "--num-spare-ranks", "1") as started:
        yield started


@pytest.fixture(scope="module")
def expected(server):
    return ask_all(server)


def kill_under_streams(server, expected, rank: int) -> float:
    """How long the group served nobody."""
    before = server.groups()[0]
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask_all, server, FEW_TOKENS)
        while server.groups()[0].num_running < NUM_STREAMS:
            assert not asked.done(), "the streams were over before anything could happen beside them"
            time.sleep(0.01)
        victim = server.process_of(0, rank)
        victim.kill()
        server.wait_until_noticed(0, before.epoch, timeout_s=2)
        rebuild_s = server.wait_until_whole(before.num_restarts + 1, 60)
        assert asked.result(60) == [tokens[:FEW_TOKENS] for tokens in expected]
    assert not victim.is_running()
    return rebuild_s


def test_a_spare_takes_the_place_of_each_rank_that_is_killed(server, expected):
    used = []
    for rank in (1, 0):
        kept = rank_processes(server)[1 - rank]
        used.append(spare := wait_for_spare(server))
        time.sleep(1.0)  # until it answers
        rebuild_s = kill_under_streams(server, expected, rank)
        assert rank_processes(server) == {rank: spare, 1 - rank: kept}
        print(f"rank {rank} killed: whole {rebuild_s:.2f} s after it was noticed, by a spare")
    assert used[0] != used[1]
    assert len([line for line in server.lines if re.search(r"started rank \d anew, serves again after", line)]) == 2


def test_a_new_group_takes_the_spares_that_there_are(server, expected):
    spare = wait_for_spare(server)
    time.sleep(1.0)  # until it answers
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask_all, server)
        for num_groups in (2, 1):
            list(server.admin.Scale(admin_pb2.ScaleRequest(num_groups=num_groups)))
            if num_groups == 2:
                ranks = rank_processes(server, 1)
                assert ranks[0] == spare
                assert ranks[1] != spare
        assert asked.result(60) == expected
    assert not spare.is_running()


def test_without_a_spare_that_answers_a_new_process_starts(server, expected):
    spare = wait_for_spare(server)
    spare.suspend()
    try:
        rebuild_s = kill_under_streams(server, expected, rank=1)
        print(f"rank 1 killed: whole {rebuild_s:.2f} s after it was noticed, by a new process")
        assert spare not in rank_processes(server).values()
    finally:
        spare.resume()


def test_a_spare_that_is_killed_is_followed_by_another(server):
    num_restarts = server.groups()[0].num_restarts
    spare = wait_for_spare(server)
    memory = spare.memory_info()
    print(f"a spare holds {memory.rss / 2**20:.0f} MiB, of which {memory.shared / 2**20:.0f} MiB are files")
    spare.kill()
    assert wait_for_spare(server, not_one_of=[spare]) != spare
    [group] = server.groups()
    assert (group.state, group.num_restarts) == (READY, num_restarts)


def test_a_server_with_spares_leaves_nothing_behind():
    with running("--num-spare-ranks", "2") as server:
        first = wait_for_spare(server)
        wait_for_spare(server, not_one_of=[first])
