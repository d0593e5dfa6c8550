"""When spare ranks start, are taken and are given up; with processes that are only said to live."""

import time

from octavo.errors import UnavailableError
from octavo.launch.rank_spares import SpareCondition, SpareRanks, SpareSettings
from octavo.launch.restart_policy import RestartPolicy

BUSY, READY, DEAD = SpareCondition.BUSY, SpareCondition.READY, SpareCondition.DEAD


class Spare:
    def __init__(self, node_id) -> None:
        self.node_id, self.state, self.has_ended = node_id, BUSY, False

    def condition(self):
        return self.state

    def end(self):
        self.has_ended = True


class Scene:
    def __init__(self, num_on_node=1, max_restarts=2) -> None:
        self.nodes, self.is_calm, self.is_ending = ["a"], True, False
        self.started: list[Spare] = []
        self.said: list[str] = []
        settings = SpareSettings(num_on_node, lambda: self.is_calm, lambda: RestartPolicy(max_restarts))
        self.spares = SpareRanks(settings, lambda: self.nodes, self.start, self.said.append)

    def start(self, node_id):
        if self.is_ending:
            raise UnavailableError("the server is ending")
        self.started.append(Spare(node_id))
        return self.started[-1]

    @property
    def alive(self) -> list[Spare]:
        return [spare for spare in self.started if not spare.has_ended and spare.state is not DEAD]


def test_each_node_of_ranks_has_as_many_as_are_asked_for():
    scene = Scene(num_on_node=2)
    scene.nodes = ["a", "b"]
    scene.spares.look(0)
    scene.spares.look(1)
    assert [spare.node_id for spare in scene.started] == ["a", "a", "b", "b"]


def test_only_one_that_is_ready_is_taken_and_only_once():
    scene = Scene()
    assert scene.spares.take("a") is None
    scene.spares.look(0)
    [spare] = scene.started
    assert scene.spares.take("a") is None  # it still starts
    spare.state = READY
    assert scene.spares.take("b") is None
    assert scene.spares.take("a") is spare
    assert scene.spares.take("a") is None


def test_one_that_was_taken_is_followed_when_all_groups_serve_again():
    scene = Scene()
    scene.spares.look(0)
    scene.started[0].state = READY
    scene.spares.take("a")
    scene.is_calm = False
    for now in range(1, 20):
        scene.spares.look(now)
    assert len(scene.started) == 1
    scene.is_calm = True
    scene.spares.look(20)
    assert len(scene.started) == 2
    scene.spares.end_all()
    assert [spare.has_ended for spare in scene.started] == [False, True]  # the first is a rank now


def test_a_group_that_never_serves_again_is_not_waited_for_without_end():
    scene = Scene()
    scene.is_calm = False
    for now in (0, 59):
        scene.spares.look(now)
    assert not scene.started
    scene.spares.look(60)
    assert scene.started


def test_a_wait_begins_anew_each_time():
    scene = Scene()
    scene.spares.look(0)
    scene.spares.look(100)
    scene.started[0].state = READY
    scene.spares.take("a")
    scene.is_calm = False
    scene.spares.look(101)
    assert len(scene.started) == 1


def test_one_that_dies_is_followed_and_not_taken():
    scene = Scene()
    scene.spares.look(0)
    scene.started[0].state = READY
    scene.spares.look(1)
    scene.started[0].state = DEAD
    assert scene.spares.take("a") is None
    scene.spares.look(2)
    assert [spare.state for spare in scene.started] == [DEAD, BUSY]


def test_those_that_keep_dying_come_ever_later_and_are_given_up_with_one_line():
    scene = Scene(max_restarts=3)
    scene.nodes = ["node-a-of-many", "b"]
    starts = []
    for now in range(200):
        num_before = len(scene.started)
        scene.spares.look(now / 10)
        for spare in scene.started[num_before:]:
            if spare.node_id != "b":
                starts.append(now / 10)
                spare.state = DEAD
    # The first death is forgiven at the next look; then 0.5 s, and 1 s.
    assert starts == [0, 0.1, 0.7, 1.8]
    assert scene.said == ["spare ranks of node node-a-o died 4 time(s) within 10 minutes: no more are kept there"]
    assert [spare.node_id for spare in scene.alive] == ["b"]


def test_those_of_a_node_without_ranks_end():
    scene = Scene()
    scene.spares.look(0)
    scene.nodes = ["b"]
    scene.spares.look(1)
    assert [(spare.node_id, spare.has_ended) for spare in scene.started] == [("a", True), ("b", False)]


def test_the_thread_starts_them_and_ends_with_the_server():
    scene = Scene()
    scene.spares.start()
    deadline = time.monotonic() + 10
    while not scene.started:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    scene.spares.stop()
    scene.spares.end_all()
    assert [spare.has_ended for spare in scene.started] == [True]
    assert not scene.spares.is_running


def test_a_server_that_ends_meanwhile_ends_the_thread():
    scene = Scene()
    scene.is_ending = True
    scene.spares.start()
    deadline = time.monotonic() + 10
    while scene.spares.is_running:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    scene.spares.stop()
    assert not scene.started
