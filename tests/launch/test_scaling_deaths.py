"""Changes of scale while coordinators die: in the end everybody knows the same groups, and all of them serve.

Scaler and Recovery are real; the coordinators, and the processes of the ranks, are only said to be.
"""

import threading
import time

import pytest
from octavo.errors import FailedPreconditionError, NotFoundError, UnavailableError
from octavo.launch import autoscaler
from octavo.launch.autoscale_policy import AutoscalePolicy
from octavo.launch.autoscaler import Autoscaler
from octavo.launch.engine_control import CoordinatorLostError, GroupBlocks
from octavo.launch.rank_probe import RankLoss
from octavo.launch.recovery import Recovery
from octavo.launch.scale_plan import Scale, ScaleBounds
from octavo.launch.scaler import Scaler
from octavo.proto import admin_pb2, engine_pb2

READY = admin_pb2.GROUP_STATE_READY


def wait_until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.002)


class Coordinator:
    """One of several. Calls wait at gates, of names such as "add 1", until they open or the coordinator dies."""

    def __init__(self, closed_gates=()) -> None:
        self.groups = {}  # the number of each, and its state
        self.reached = set()
        self.closed_gates = set(closed_gates)
        self.refusals = {}  # by gate
        self.is_up, self.is_dead = True, False

    def pass_gate(self, gate):
        self.require_alive()
        self.reached.add(gate)
        wait_until(lambda: self.is_dead or gate not in self.closed_gates)
        self.require_alive()
        if error := self.refusals.pop(gate, None):
            raise error

    def require_alive(self):
        if self.is_dead or not self.is_up:
            raise CoordinatorLostError("Socket closed")


class Server:
    """Groups of one rank, in all roles but those of Scaler and Recovery."""

    def __init__(self, num_groups, closed_gates=()) -> None:
        self.sizes = dict.fromkeys(range(num_groups), 1)
        self.coordinator = Coordinator(closed_gates)
        self.coordinator.groups = dict.fromkeys(self.sizes, READY)
        self.said, self.lost, self.replaced, self.ended = [], {}, [], []
        self.recovery = Recovery(self, self, lambda g: engine_pb2.AddGroupRequest(group_id=g), self.said.append, 0)
        for group_id in self.sizes:
            self.recovery.add(group_id)
        self.scaler = Scaler(self, self, self.recovery, Scale(num_groups, 1), ScaleBounds(), self.said.append)
        self.ranks_answer = threading.Event()
        self.ranks_answer.set()
        self.outcome = []
        self.changing = threading.Thread()

    # As the keeper

    def die(self):
        self.coordinator.is_dead = True

    def follow(self, *closed_gates):
        """Another coordinator takes office."""
        self.coordinator = coordinator = Coordinator(closed_gates)

        def wait_until_up():
            if coordinator.is_dead:
                raise UnavailableError("it died, too")

        self.recovery.restore(wait_until_up)

    # As WorkerGroups

    def check_size(self, num_ranks):
        pass

    def num_free_ranks(self, wanted):
        return 8

    def start_ranks(self, num_groups, num_ranks):
        [group_id] = range(max(self.sizes) + 1, max(self.sizes) + 1 + num_groups)
        self.sizes[group_id] = num_ranks
        return [group_id]

    def end(self, group_id):
        del self.sizes[group_id]
        self.ended.append(group_id)

    def add(self, group_id, report):
        return self.add_group(engine_pb2.AddGroupRequest(group_id=group_id), report)

    # As EngineControl

    def add_group(self, request, report):
        coordinator, group_id = self.coordinator, request.group_id
        coordinator.pass_gate(f"add {group_id}")
        assert coordinator.groups.get(group_id) != READY
        assert group_id in self.sizes, "it has no ranks any more"
        coordinator.groups[group_id] = READY
        coordinator.pass_gate(f"added {group_id}")
        return GroupBlocks(10, 0)

    def abandon_group(self, group_id):
        self.coordinator.require_alive()

    def remove_group(self, group_id, report):
        coordinator = self.coordinator
        coordinator.require_alive()
        if group_id not in coordinator.groups:
            raise NotFoundError(f"there is no group {group_id}")
        report(7)
        coordinator.pass_gate(f"remove {group_id}")
        del coordinator.groups[group_id]
        coordinator.pass_gate(f"removed {group_id}")

    def status(self):
        coordinator = self.coordinator
        coordinator.require_alive()
        groups = [admin_pb2.GroupStatus(group_id=g, state=state) for g, state in coordinator.groups.items()]
        return admin_pb2.GetStatusResponse(groups=groups)

    # As RayCluster

    def find_lost(self, group_id):
        assert self.ranks_answer.wait(10)
        return {0: RankLoss.DIED} if self.lost.pop(group_id, None) else {}

    def replace(self, group_id, lost):
        self.replaced += [group_id] * len(lost)

    def all_of(self, group_id):
        return {0: RankLoss.HANGS}

    # The test

    def begin(self, num_groups):
        def change():
            try:
                self.outcome.append([news.message for news in self.scaler.scale(num_groups)])
            except Exception as error:
                self.outcome.append(error)

        self.changing = threading.Thread(target=change)
        self.changing.start()

    def reach(self, gate):
        coordinator = self.coordinator
        wait_until(lambda: gate in coordinator.reached)

    def end_of_change(self):
        self.changing.join(10)
        [outcome] = self.outcome
        return outcome

    def fail(self, group_id, epoch):
        failure = engine_pb2.GroupFailure(group_id=group_id, epoch=epoch, reason="rank 0 died")
        self.coordinator.groups[group_id] = admin_pb2.GROUP_STATE_FAILED
        self.recovery.take([failure])

    def check_consistent(self, *group_ids):
        """Ray, Scaler, Recovery and coordinator know these groups and no others."""
        wait_until(lambda: self.recovery.is_restored and set(self.coordinator.groups) == set(group_ids))
        assert set(self.sizes) == set(group_ids)
        assert self.scaler.target == Scale(len(group_ids), 1)
        assert self.scaler.is_settled
        known = len(self.recovery._groups)
        assert (known, len(self.recovery._leaving)) == (len(group_ids), 0)
        self.follow()  # and so it stays
        wait_until(lambda: self.recovery.is_restored)
        assert set(self.coordinator.groups) == set(group_ids)
        self.recovery.check()


def test_a_group_that_starts_when_the_coordinator_dies_starts_under_the_next():
    server = Server(1, ["add 1"])
    server.begin(2)
    server.reach("add 1")
    server.die()
    server.follow()
    assert server.end_of_change()[-1].startswith("there are 2 group(s) of 1 rank(s) now")
    server.check_consistent(0, 1)


def test_so_it_does_if_its_answer_was_on_the_way():
    server = Server(1, ["added 1"])
    server.begin(2)
    server.reach("added 1")
    server.die()
    server.follow()
    assert server.end_of_change()[-1].startswith("there are 2 group(s)")
    server.check_consistent(0, 1)


def test_so_it_does_if_two_coordinators_die_and_a_rank_of_it_does():
    server = Server(1, ["add 1"])
    server.begin(2)
    server.reach("add 1")
    server.die()
    server.follow("add 1")
    server.reach("add 1")
    server.lost = {1: True}
    server.die()
    server.follow()
    server.end_of_change()
    assert server.replaced == [1]
    server.check_consistent(0, 1)


def test_so_it_does_if_nobody_answers_for_a_while():
    server = Server(1, ["add 1"])
    server.begin(2)
    server.reach("add 1")
    server.die()
    with pytest.raises(FailedPreconditionError, match="another change is under way, to 2 group"):
        server.scaler.scale(3)
    server.follow()
    server.end_of_change()
    server.check_consistent(0, 1)


def test_a_group_that_cannot_start_under_the_next_coordinator_leaves_nothing():
    server = Server(1, ["add 1"])
    server.begin(2)
    server.reach("add 1")
    server.die()
    server.follow("add 1")
    server.reach("add 1")
    server.coordinator.refusals["add 1"] = UnavailableError("rank 0: its stream broke off")
    server.coordinator.closed_gates.clear()
    error = server.end_of_change()
    assert str(error) == "group 1 did not start, and nothing has changed: rank 0: its stream broke off"
    assert server.ended == [1]
    server.check_consistent(0)


def test_a_group_that_fails_before_its_first_answer_is_read_is_rebuilt():
    server = Server(1, ["added 1"])
    server.recovery._max_restarts = 3
    server.begin(2)
    server.reach("added 1")
    server.lost = {1: True}
    server.fail(1, epoch=5)
    wait_until(lambda: server.replaced == [1])
    server.coordinator.closed_gates.clear()
    server.end_of_change()
    server.check_consistent(0, 1)


@pytest.mark.parametrize("gate", ["remove 1", "removed 1"])
def test_a_group_that_leaves_when_the_coordinator_dies_has_left(gate):
    server = Server(2, [gate])
    server.begin(1)
    server.reach(gate)
    server.die()
    server.follow()
    said = server.end_of_change()
    assert "group 1 has left with its coordinator: another is not told of it" in said
    assert said[-1].startswith("there are 1 group(s)")
    assert server.ended == [1]
    server.check_consistent(0)


def test_a_group_that_is_to_leave_and_that_the_next_coordinator_was_not_told_of_has_left():
    """It was just being taken over, and that had to wait."""
    server = Server(2)
    server.die()
    server.ranks_answer.clear()
    server.follow()
    server.coordinator.groups = {0: READY, 1: READY}  # as the last one had them, when the change was planned
    server.begin(1)
    wait_until(lambda: server.recovery._leaving)
    server.coordinator.groups = {}
    server.ranks_answer.set()
    assert server.end_of_change()[-1].startswith("there are 1 group(s)")
    server.check_consistent(0)


def test_a_group_stays_if_no_other_is_left_when_the_coordinator_dies():
    server = Server(2, ["remove 1"])
    server.begin(1)
    server.reach("remove 1")
    server.fail(0, epoch=3)  # and is given up
    wait_until(lambda: list(server.recovery.given_up) == [0])
    server.recovery.check()  # the server does not end for it
    server.die()
    assert isinstance(server.end_of_change(), CoordinatorLostError)
    server.follow()
    wait_until(lambda: server.coordinator.groups == {1: READY})
    assert set(server.sizes) == {0, 1}
    server.outcome.clear()
    server.begin(1)  # buries the one that is given up
    server.end_of_change()
    server.check_consistent(1)


def test_a_group_that_must_stay_and_fails_at_once_is_rebuilt():
    server = Server(2, ["remove 1"])
    server.recovery._max_restarts = 3
    server.begin(1)
    server.reach("remove 1")
    server.coordinator.refusals["remove 1"] = FailedPreconditionError("group 1 serves on: it is the last one")
    server.lost = {1: True}
    server.fail(1, epoch=9)  # before anybody has read that it stays
    assert 9 in server.recovery.known_epochs
    server.coordinator.closed_gates.clear()
    assert isinstance(server.end_of_change(), FailedPreconditionError)
    wait_until(lambda: server.replaced == [1])
    server.check_consistent(0, 1)


def test_a_group_that_must_stay_is_taken_over_by_a_coordinator_that_came_meanwhile():
    server = Server(2, ["remove 1"])
    server.begin(1)
    server.reach("remove 1")
    before = server.coordinator
    server.follow()
    before.refusals["remove 1"] = FailedPreconditionError("group 1 serves on: it is the last one")
    before.closed_gates.clear()
    assert isinstance(server.end_of_change(), FailedPreconditionError)
    server.check_consistent(0, 1)


def test_a_group_that_was_given_up_is_buried_though_the_next_coordinator_never_knew_it():
    server = Server(2)
    server.fail(1, epoch=3)
    wait_until(lambda: list(server.recovery.given_up) == [1])
    server.die()
    server.follow()
    wait_until(lambda: server.recovery.is_restored)
    server.begin(2)
    server.end_of_change()
    assert server.ended == [1]
    server.check_consistent(0, max(server.sizes))


@pytest.mark.parametrize("dies", [False, True])
@pytest.mark.parametrize(("num_groups", "target", "gate"), [(1, 2, "add 1"), (2, 1, "remove 1")])
def test_a_server_that_ends_leaves_the_change_where_it_is(num_groups, target, gate, dies):
    server = Server(num_groups, [gate])
    server.begin(target)
    server.reach(gate)
    num_said = len(server.said)
    if dies:
        server.die()
        if target == 1:  # it had left before anybody was told to stop
            server.end_of_change()
            return
    server.scaler.stop()
    server.recovery.stop()
    server.die()
    assert isinstance(server.end_of_change(), UnavailableError)
    assert set(server.sizes) == {0, 1}, "ranks end with the cluster"
    assert server.said[num_said:] == []


def test_the_autoscaler_takes_no_coordinators_death_for_a_refusal(monkeypatch):
    monkeypatch.setattr(autoscaler, "_LOOK_S", 0.001)
    looks = threading.Semaphore(0)

    class Policy(AutoscalePolicy):
        failures = 0

        def note_failure(self, now):
            self.failures += 1

    def status():
        looks.release()
        return server.status()

    server, policy = Server(1), Policy(1, 2)
    running = Autoscaler(server.scaler, policy, status, 16, server.said.append)
    for is_dead in (False, True):
        server.coordinator.is_dead = is_dead
        for _ in range(5):
            assert looks.acquire(timeout=5)
    running.stop()
    assert (server.said, policy.failures) == ([], 0)
