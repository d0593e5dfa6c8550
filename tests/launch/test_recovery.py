"""When groups are rebuilt, what is replaced, and when one is given up: with ranks and a coordinator that obey."""

import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from octavo.errors import UnavailableError
from octavo.launch.rank_probe import RankLoss, find_lost_ranks
from octavo.launch.recovery import Recovery
from octavo.launch.restart_policy import RestartPolicy
from octavo.proto import engine_pb2, worker_pb2, worker_pb2_grpc


def test_a_group_that_lived_long_is_rebuilt_at_once_and_one_that_keeps_dying_later_each_time():
    policy = RestartPolicy(max_restarts=100)
    delays, now = [], 0.0
    for _ in range(9):
        delays.append(policy.delay_s(now))
        policy.serves(now := now + delays[-1] + 2)
        now += 1
    assert delays == [0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    assert policy.delay_s(now + 11) == 0.0
    assert policy.delay_s(now + 12) == 0.5  # the attempt failed


def test_one_failure_too_many_within_ten_minutes_is_the_last():
    policy = RestartPolicy(max_restarts=2)
    assert [policy.delay_s(now) is None for now in (0, 300, 599)] == [False, False, True]
    assert policy.num_failures == 3
    assert policy.delay_s(1000) is not None  # two are forgotten
    assert RestartPolicy(max_restarts=0).delay_s(0) is None


def test_failures_that_are_explained_are_forgiven_and_delays_stay():
    policy = RestartPolicy(max_restarts=3)
    for _ in range(4):
        delays = [policy.delay_s(0), policy.delay_s(1)]
        policy.forgive()
        delays.append(policy.delay_s(2))
        policy.forgive()
        assert None not in delays
    assert policy.delay_s(3) > 8


class Ranks:
    """Of two groups of two ranks, of which rank 1 is dead."""

    def __init__(self) -> None:
        self.lost = {1: RankLoss.DIED}
        self.replaced = []
        self.failures = []  # of replacing, one each time

    def find_lost(self, group_id):
        return self.lost

    def all_of(self, group_id):
        return {0: RankLoss.HANGS, 1: RankLoss.HANGS}

    def replace(self, group_id, lost):
        self.replaced.append((group_id, list(lost)))
        if self.failures:
            raise self.failures.pop()


class Control:
    def __init__(self) -> None:
        self.added, self.abandoned = [], []
        self.is_dead = False
        self.failures = []  # of adding, one each time

    def add_group(self, request, report):
        assert request.has_served
        if self.failures:
            raise self.failures.pop()
        self.added.append(request.group_id)

    def abandon_group(self, group_id):
        self.abandoned.append(group_id)
        if self.is_dead:
            raise UnavailableError("Socket closed")


class Scene:
    def __init__(self, max_restarts=5, num_groups=2) -> None:
        self.ranks, self.control, self.said = Ranks(), Control(), []
        self.asked = []
        self.heard = threading.Semaphore(0)
        self.recovery = Recovery(
            self.ranks,
            self.control,
            self.request,
            self.say,
            max_restarts=max_restarts,
        )
        for group_id in range(num_groups):
            self.recovery.add(group_id)

    def request(self, group_id):
        self.asked.append("request")
        return engine_pb2.AddGroupRequest(group_id=group_id)

    def say(self, line):
        self.said.append(line)
        self.heard.release()

    def fail(self, group_id, epoch, **fields):
        why = "rank 1: its stream broke off"
        failure = engine_pb2.GroupFailure(group_id=group_id, epoch=epoch, reason=why, silent_s=0.25, **fields)
        self.recovery.take([failure])

    def wait(self):
        assert self.heard.acquire(timeout=5)


@pytest.fixture
def scene():
    made = Scene()
    yield made
    made.recovery.stop()


def test_only_what_is_lost_is_replaced(scene):
    scene.fail(0, epoch=1)
    scene.wait()
    assert (scene.ranks.replaced, scene.control.added) == ([(0, [1])], [0])
    assert scene.said[0].startswith(
        "group 0 failed: rank 1: its stream broke off (last heard of 0.25 s before); started rank 1 anew, serves again"
    )
    assert set(scene.recovery.known_epochs) == {0, 1}


def test_a_group_is_not_given_up_for_what_a_request_did():
    scene = Scene(max_restarts=2)
    for epoch, is_explained in enumerate([False, False, True, False], start=1):
        scene.fail(0, epoch, is_explained=is_explained)
        scene.wait()
    assert scene.control.added == [0] * 4
    assert not scene.control.abandoned
    scene.recovery.stop()


def test_where_nothing_is_lost_and_that_does_not_help_all_are(scene):
    scene.control.failures = [UnavailableError("rank 0: CUDA is lost")] * 2
    scene.fail(0, epoch=1)
    scene.wait()
    assert scene.said == ["group 0: rebuilding it failed: rank 0: CUDA is lost"]
    scene.fail(0, epoch=2)  # as the coordinator says of the attempt
    scene.wait()
    scene.ranks.lost = {}
    scene.fail(0, epoch=3)
    scene.wait()
    assert scene.ranks.replaced == [(0, [1]), (0, [1]), (0, [0, 1])]
    assert "; started rank 0, 1 anew, serves again after" in scene.said[2]
    scene.fail(0, epoch=4)
    scene.wait()
    assert scene.ranks.replaced[3] == (0, [])
    assert "; kept all ranks, serves again after" in scene.said[3]


def test_ranks_that_do_not_start_are_tried_again_and_hold_up_no_other_group(scene):
    scene.ranks.failures = [UnavailableError("a rank did not start: no room")]
    scene.fail(0, epoch=1)
    scene.wait()
    scene.fail(1, epoch=2)
    scene.wait()
    scene.wait()
    assert sorted(scene.control.added) == [0, 1]
    scene.recovery.check()


def wait_until_given_up(scene, num_groups):
    while len(scene.recovery.given_up) < num_groups:
        threading.Event().wait(0.01)


def test_groups_that_are_given_up_are_told_of_in_the_order_of_time():
    scene = Scene(max_restarts=0, num_groups=3)
    for num_given_up, group_id in enumerate([2, 0], start=1):
        scene.fail(group_id, epoch=num_given_up)
        wait_until_given_up(scene, num_given_up)
        scene.recovery.check()
        assert scene.said[-1].startswith(f"worker group {group_id} failed")
    assert len(scene.said) == 2
    scene.recovery.stop()


def test_groups_come_and_go(scene):
    scene.recovery.add(2)
    scene.fail(2, epoch=1)
    scene.wait()
    assert scene.control.added == [2]
    scene.recovery.remove(2)
    assert 1 not in scene.recovery.known_epochs
    scene.fail(2, epoch=2)  # a late word of one that has left
    assert 2 in scene.recovery.known_epochs  # or the coordinator would say it again at once
    scene.recovery.check()
    assert scene.control.added == [2]


def test_a_group_that_is_removed_is_not_rebuilt_behind_the_back_of_who_removed_it():
    scene = Scene()
    begun, goes_on = threading.Event(), threading.Event()

    def find_lost(group_id):
        begun.set()
        goes_on.wait(5)
        return {}

    scene.ranks.find_lost = find_lost
    scene.fail(0, epoch=1)
    begun.wait(5)
    threading.Timer(0.2, goes_on.set).start()
    scene.recovery.remove(0)
    assert goes_on.is_set()
    assert scene.control.added == []
    scene.recovery.stop()


def test_a_group_that_was_given_up_and_removed_no_longer_counts():
    scene = Scene(max_restarts=0)
    scene.fail(0, epoch=1)
    wait_until_given_up(scene, 1)
    scene.recovery.remove(0)
    assert list(scene.recovery.given_up) == []
    scene.recovery.check()
    scene.recovery.stop()


def test_a_group_is_given_up_alone_and_the_last_one_ends_the_server():
    scene = Scene(max_restarts=0)
    scene.fail(0, epoch=1)
    wait_until_given_up(scene, 1)
    scene.recovery.check()
    scene.recovery.check()
    assert scene.said == [
        "worker group 0 failed 1 time(s) within 10 minutes and is given up; "
        "the last time: rank 1: its stream broke off; the other groups go on"
    ]
    scene.fail(1, epoch=2)
    wait_until_given_up(scene, 2)
    assert scene.control.abandoned == [0, 1]
    with pytest.raises(UnavailableError, match=r"worker group . failed 1 time.s. within 10 minutes and is given up"):
        scene.recovery.check()
    assert scene.control.added == []
    scene.recovery.stop()


def wait_until(condition):
    for _ in range(500):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it did not happen")


def test_another_coordinator_takes_over_all_groups_as_they_are(scene):
    scene.ranks.lost = {}
    scene.recovery.restore(lambda: None)
    wait_until(lambda: scene.recovery.is_restored)
    assert sorted(scene.control.added) == [0, 1]
    assert all(not lost for _, lost in scene.ranks.replaced)
    assert scene.said == []  # of this the line about the coordinator speaks


def test_another_coordinator_is_up_before_it_is_asked_whose_weights_a_group_may_copy():
    scene = Scene(num_groups=1)
    scene.recovery.restore(lambda: scene.asked.append("up"))
    wait_until(lambda: scene.recovery.is_restored)
    assert scene.asked == ["up", "request"]


def test_a_rank_that_died_with_the_coordinator_is_replaced_and_that_is_said(scene):
    scene.recovery.restore(lambda: None)
    scene.wait()
    scene.wait()
    said = sorted(scene.said)[0]
    assert said.startswith("group 0 was taken over by another coordinator; started rank 1 anew, serves again after")
    assert sorted(scene.ranks.replaced) == [(0, [1]), (1, [1])]


def test_a_rank_that_does_not_start_is_tried_again_under_the_other_coordinator(scene):
    scene.ranks.failures = [UnavailableError("a rank did not start: no room")]
    scene.recovery.restore(lambda: None)
    wait_until(lambda: scene.recovery.is_restored)
    assert sorted(scene.control.added) == [0, 1]
    assert len(scene.ranks.replaced) == 3


def test_an_attempt_for_a_coordinator_that_died_is_not_made_for_the_next(scene):
    """It was at the ranks when the coordinator died; the group is taken over once, and no rank replaced for it."""
    at_the_ranks, goes_on = threading.Event(), threading.Event()

    def replace(group_id, lost):
        scene.ranks.replaced.append((group_id, list(lost)))
        if group_id == 0 and len(scene.ranks.replaced) == 1:
            at_the_ranks.set()
            assert goes_on.wait(5)

    scene.ranks.replace = replace
    scene.fail(0, epoch=1)
    assert at_the_ranks.wait(5)
    scene.ranks.lost = {}
    scene.recovery.restore(lambda: None)
    goes_on.set()
    wait_until(lambda: scene.recovery.is_restored)
    assert sorted(scene.control.added) == [0, 1]
    assert sorted(scene.ranks.replaced) == [(0, []), (0, [1]), (1, [])]


def test_the_call_that_ended_with_the_coordinator_has_no_rank_replaced(scene):
    scene.ranks.lost = {}
    scene.control.failures = [UnavailableError("Socket closed")]
    scene.fail(0, epoch=1)
    scene.wait()
    scene.recovery.restore(lambda: None)
    wait_until(lambda: scene.recovery.is_restored)
    assert all(not lost for _, lost in scene.ranks.replaced)


def test_a_coordinator_that_dies_too_before_it_answers_is_followed_by_a_third(scene):
    def never_up():
        raise UnavailableError("coordinator was killed by signal 9")

    scene.ranks.lost = {}
    scene.recovery.restore(never_up)
    scene.recovery.restore(lambda: None)
    wait_until(lambda: scene.recovery.is_restored)
    assert sorted(scene.control.added) == [0, 1]
    assert scene.said == []


def test_the_coordinator_is_asked_for_weights_only_when_it_is_there(scene):
    """To make a request is to ask it which other groups serve."""
    is_up = threading.Event()

    def make_request(group_id):
        if not is_up.is_set():
            raise UnavailableError("the coordinator does not answer")
        return engine_pb2.AddGroupRequest(group_id=group_id)

    scene.ranks.lost = {}
    for group in scene.recovery._groups.values():
        group._make_request = make_request
    scene.recovery.restore(is_up.set)
    wait_until(lambda: scene.recovery.is_restored)
    scene.recovery.check()
    assert sorted(scene.control.added) == [0, 1]


def test_an_attempt_whose_coordinator_dies_before_it_is_asked_ends_without_harm(scene):
    def make_request(group_id):
        raise UnavailableError("the coordinator does not answer")

    scene.ranks.lost = {}
    scene.recovery._groups[0]._make_request = make_request
    scene.fail(0, epoch=1)
    scene.wait()
    scene.recovery.check()
    assert scene.said == ["group 0: rebuilding it failed: the coordinator does not answer"]


def test_a_group_that_was_given_up_stays_so_also_if_the_coordinator_could_not_be_told():
    scene = Scene(max_restarts=0)
    scene.control.is_dead = True
    scene.fail(0, epoch=1)
    wait_until(lambda: scene.control.abandoned)
    scene.ranks.lost = {}
    scene.recovery.restore(lambda: None)
    wait_until(lambda: scene.recovery.is_restored)
    assert scene.control.added == [1]
    scene.recovery.check()
    assert [line.endswith("; the other groups go on") for line in scene.said] == [True]
    scene.recovery.stop()


def check_for_long(recovery):
    for _ in range(500):
        recovery.check()
        threading.Event().wait(0.01)


def test_a_fault_of_ours_is_not_kept_quiet(scene):
    scene.ranks.failures = [KeyError("a bug")]
    scene.fail(0, epoch=1)
    with pytest.raises(KeyError, match="a bug"):
        check_for_long(scene.recovery)


class FakeWorker(worker_pb2_grpc.WorkerServicer):
    def __init__(self, hangs) -> None:
        self.goes_on = threading.Event()
        if not hangs:
            self.goes_on.set()

    def Ping(self, request, context):
        self.goes_on.wait(10)
        return worker_pb2.PingResponse(epoch=1)


def test_ranks_that_are_dead_and_that_hang_are_told_apart():
    servers, workers, addresses = [], [FakeWorker(hangs=False), FakeWorker(hangs=True), FakeWorker(hangs=False)], []
    for worker in workers:
        server = grpc.server(ThreadPoolExecutor(1))
        worker_pb2_grpc.add_WorkerServicer_to_server(worker, server)
        addresses.append(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
        server.start()
        servers.append(server)
    servers[2].stop(None).wait()
    assert find_lost_ranks(addresses) == {1: RankLoss.HANGS, 2: RankLoss.DIED}
    workers[1].goes_on.set()
    for server in servers:
        server.stop(None).wait()
