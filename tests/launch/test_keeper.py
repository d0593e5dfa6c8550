"""What becomes of a coordinator and of gateways that die: with processes that are only said to."""

import threading
import time
from concurrent.futures import Future

import grpc
import pytest
from octavo.errors import UnavailableError
from octavo.launch.keeper import Keeper
from octavo.launch.kept_process import Heartbeat, KeptProcess
from octavo.launch.restart_policy import RestartPolicy


class Child:
    """A process."""

    def __init__(self, name="gateway 0") -> None:
        self.name = name
        self.end = ""  # how it ended
        self.was_drained = False

    @property
    def has_ended(self):
        return bool(self.end) or self.was_drained

    def describe_end(self):
        return f"{self.name} {self.end}"

    def kill(self):
        self.end = "was killed by signal 9"

    def reap(self):
        assert self.has_ended

    def require_alive(self):
        if self.has_ended:
            raise UnavailableError(self.describe_end())


class Scene:
    """One process that is kept, and a clock."""

    def __init__(self, max_restarts=5, name="gateway 0") -> None:
        self.name = name
        self.started = [Child(name)]
        self.said = []
        self.serves, self.hangs = True, False
        policy = RestartPolicy(max_restarts)
        self.kept = KeptProcess(
            self.started[0], self.start, lambda: self.serves, Heartbeat(self.ask), policy, self.said.append
        )

    def ask(self, timeout_s):
        answer = Future()
        answer.set_exception(DeadlineError()) if self.hangs else answer.set_result(None)
        return answer

    def start(self):
        self.started.append(Child(self.name))
        return self.started[-1]

    def die(self):
        self.started[-1].end = "was killed by signal 9"


def test_one_that_dies_is_started_anew_at_once_and_said_to_serve_when_it_does():
    scene = Scene()
    scene.kept.tend(0.0)
    assert (len(scene.started), scene.kept.is_down) == (1, False)
    scene.die()
    scene.serves = False
    scene.kept.tend(10.0)
    assert (len(scene.started), scene.kept.is_down) == (2, True)
    scene.kept.tend(11.0)
    assert scene.said == []
    scene.serves = True
    scene.kept.tend(11.9)
    assert scene.said == ["gateway 0 was killed by signal 9; started anew, serves again after 1.9 s"]
    assert (len(scene.started), scene.kept.is_down) == (2, False)


def test_one_that_keeps_dying_waits_longer_each_time_and_is_given_up():
    scene = Scene(max_restarts=3)
    now, waits = 0.0, []
    for _ in range(3):
        scene.die()
        died_at, num_started = now, len(scene.started)
        while len(scene.started) == num_started:
            scene.kept.tend(now)
            now += 0.25
        waits.append(now - 0.25 - died_at)
        scene.kept.tend(now)  # it serves
    assert waits == [0.0, 0.5, 1.0]
    scene.die()
    with pytest.raises(UnavailableError) as caught:
        scene.kept.tend(now)
    assert str(caught.value) == (
        "gateway 0 failed 4 time(s) within 10 minutes and is given up; the last time: gateway 0 was killed by signal 9"
    )


def test_one_that_dies_before_it_serves_has_been_down_since_the_first_time():
    scene = Scene()
    scene.serves = False
    scene.die()
    scene.kept.tend(0.0)
    scene.die()
    scene.kept.tend(1.0)
    scene.kept.tend(1.5)
    scene.serves = True
    scene.kept.tend(2.0)
    assert scene.said == ["gateway 0 was killed by signal 9; started anew, serves again after 2.0 s"]
    assert len(scene.started) == 3


class DeadlineError(Exception):
    def code(self):
        return grpc.StatusCode.DEADLINE_EXCEEDED


class RefusedError(Exception):
    def code(self):
        return grpc.StatusCode.UNAVAILABLE


def beats_of(answers):
    """Whether it hangs, after each of these answers."""
    calls = []

    def ask(timeout_s):
        calls.append(Future())
        return calls[-1]

    heartbeat, now, found = Heartbeat(ask), 10.0, []
    heartbeat.has_stopped(now)
    for answer in answers:
        assert not heartbeat.has_stopped(now)  # while it may still answer
        calls[-1].set_exception(answer) if answer else calls[-1].set_result(None)
        now += 1.0
        found.append(heartbeat.has_stopped(now))
        if found[-1]:
            break
    return found


def test_only_answers_that_do_not_come_twice_in_a_row_are_those_of_one_that_hangs():
    late, refused = DeadlineError(), RefusedError()
    assert beats_of([None, None]) == [False, False]
    assert beats_of([late, None, late, refused, late]) == [False] * 5
    assert beats_of([None, late, late]) == [False, False, True]


class Control:
    def __init__(self) -> None:
        self.failures = []
        self.waited = []

    def await_failures(self, known_epochs, timeout_s):
        time.sleep(0.005)
        failures, self.failures = self.failures, []
        return failures

    def wait_until_up(self, require_alive):
        self.waited.append(require_alive)


class Recovery:
    known_epochs = ()

    def __init__(self) -> None:
        self.taken, self.restored, self.error, self.stopped = [], 0, None, False

    def take(self, failures):
        self.taken += failures

    def restore(self, wait_until_up):
        self.restored += 1
        wait_until_up()

    def check(self):
        if self.error:
            raise self.error

    def stop(self):
        self.stopped = True


class Server:
    """A keeper of a coordinator and two gateways."""

    def __init__(self, max_restarts=5) -> None:
        self.coordinator = Scene(max_restarts, "coordinator")
        self.gateways = [Scene(max_restarts, f"gateway {index}") for index in range(2)]
        self.control, self.recovery, self.said = Control(), Recovery(), []
        self.cluster_error = None
        kept = [gateway.kept for gateway in self.gateways]
        self.keeper = Keeper(
            self.coordinator.kept, kept, self.recovery, self.control, self.require_cluster, self.said.append
        )
        self.keeper.start()

    def require_cluster(self):
        if self.cluster_error:
            raise self.cluster_error


@pytest.fixture
def server():
    made = Server()
    yield made
    made.keeper.stop()


def wait_until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def test_a_coordinator_that_dies_comes_back_and_takes_over_the_groups(server):
    server.control.failures = ["of a group"]
    wait_until(lambda: server.recovery.taken == ["of a group"])
    server.coordinator.die()
    wait_until(lambda: server.coordinator.said)
    assert server.recovery.restored == 1
    [require_alive] = server.control.waited
    assert require_alive == server.coordinator.started[1].require_alive
    assert not any(len(gateway.started) > 1 for gateway in server.gateways)


@pytest.mark.parametrize("kind", ["coordinator", "gateway 1"])
def test_one_that_hangs_is_killed_first(server, kind):
    scene = server.coordinator if kind == "coordinator" else server.gateways[1]
    scene.hangs = True
    wait_until(lambda: len(scene.started) > 1)
    scene.hangs = False
    wait_until(lambda: scene.said)
    assert scene.started[0].has_ended
    assert scene.said[0].startswith(f"{kind} did not answer for 8 s, and was killed; started anew, serves again after ")
    assert server.recovery.restored == (kind == "coordinator")
    assert len(scene.started) == 2, "the answers of the one before do not count against it"


def test_a_gateway_that_dies_comes_back_and_one_that_was_drained_does_not(server):
    server.gateways[0].die()
    wait_until(lambda: server.gateways[0].said)
    server.gateways[1].started[0].was_drained = True
    wait_until(lambda: server.said)
    assert server.said == ["gateway 1 was drained, and has ended; 1 go on"]
    assert [len(gateway.started) for gateway in server.gateways] == [2, 1]
    server.gateways[0].started[1].was_drained = True
    with pytest.raises(UnavailableError, match="gateway 0 was drained, and has ended; it was the last one: start the"):
        server.keeper.watch()
    assert not server.keeper.has_lost_engine


def test_a_gateway_that_is_given_up_is_not_missed_while_there_are_others():
    server = Server(max_restarts=0)
    server.gateways[1].die()
    wait_until(lambda: server.said)
    assert server.said == [
        "gateway 1 failed 1 time(s) within 10 minutes and is given up; "
        "the last time: gateway 1 was killed by signal 9; 1 go on"
    ]
    server.keeper.stop()


def test_in_a_drain_only_what_running_requests_need_comes_back(server):
    children = server.keeper.drain()
    assert children == [gateway.started[0] for gateway in server.gateways]
    server.gateways[0].die()
    server.cluster_error = UnavailableError("Ray's raylet died")  # is ending
    server.coordinator.die()
    wait_until(lambda: server.coordinator.said)
    assert len(server.gateways[0].started) == 1
    assert server.keeper.stop() is server.coordinator.started[1]
    assert server.recovery.stopped


@pytest.mark.parametrize("lost", ["coordinator", "groups", "cluster"])
def test_what_a_server_cannot_be_without_ends_it(lost):
    server = Server(max_restarts=0)
    if lost == "coordinator":
        server.coordinator.die()
    elif lost == "groups":
        server.recovery.error = UnavailableError("worker group 0 is given up")
    else:
        server.cluster_error = UnavailableError("Ray's raylet died")
    with pytest.raises(
        UnavailableError, match={"groups": "group 0", "cluster": "raylet"}.get(lost, "coordinator failed")
    ):
        server.keeper.watch()
    assert server.keeper.has_lost_engine == (lost == "coordinator")
    server.keeper.stop()


def test_an_interrupt_ends_the_watch_and_not_the_keeping(server):
    interrupted = threading.Event()

    def watch():
        try:
            server.keeper.watch()
        except UnavailableError:
            interrupted.set()

    threading.Thread(target=watch, daemon=True).start()
    server.coordinator.die()
    wait_until(lambda: server.coordinator.said)
    assert not interrupted.is_set()
    server.recovery.error = UnavailableError("worker group 0 is given up")
    assert interrupted.wait(5)
