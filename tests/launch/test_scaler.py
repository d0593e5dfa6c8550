"""Changes of scale with groups, ranks and a coordinator that obey: what is done in which order, and what is refused."""

import threading

import pytest
from octavo.errors import FailedPreconditionError, InvalidArgumentError, UnavailableError
from octavo.launch.engine_control import GroupBlocks
from octavo.launch.scale_plan import Change, GroupCondition, GroupNow, Scale, ScaleBounds, plan_change
from octavo.launch.scaler import Scaler
from octavo.proto import admin_pb2

SERVES, MENDED, GIVEN_UP = GroupCondition.SERVES, GroupCondition.MENDED, GroupCondition.GIVEN_UP


class World:
    """Groups with room for `num_places` ranks, in the roles of all that a Scaler talks to."""

    def __init__(self, num_groups=1, num_places=8, **bounds) -> None:
        self.sizes = dict.fromkeys(range(num_groups), 1)
        self.states = dict.fromkeys(range(num_groups), admin_pb2.GROUP_STATE_READY)
        self.loads = {}
        self.given_up = []
        self.kept = set(self.states)  # groups that somebody rebuilds
        self.num_places = num_places
        self.done = []  # in order
        self.fails_to_load, self.cannot_leave = set(), set()
        self.may_load, self.may_leave = threading.Event(), threading.Event()
        self.may_load.set()
        self.may_leave.set()
        self.said = []
        self._lock = threading.Lock()
        self._next = num_groups
        self.on_line = lambda line: None
        self.scaler = Scaler(self, self, self, Scale(num_groups, 1), ScaleBounds(**bounds), self._say)

    def _say(self, line):
        self.said.append(line)
        self.on_line(line)

    # As WorkerGroups

    def check_size(self, num_ranks):
        if num_ranks == 3:
            raise InvalidArgumentError("tensor_parallel_size 3 does not split the model", "tensor_parallel_size")

    def num_free_ranks(self, wanted):
        return self.num_places - sum(self.sizes.values())

    def start_ranks(self, num_groups, num_ranks):
        group_ids = list(range(self._next, self._next + num_groups))
        self._next += num_groups
        self.sizes |= dict.fromkeys(group_ids, num_ranks)
        self._do("ranks", *group_ids)
        return group_ids

    def end(self, group_id):
        del self.sizes[group_id]
        self._do("end", group_id)

    # As WorkerGroups and EngineControl

    def add(self, group_id, report):
        assert group_id in self.kept, "a failure could come before anybody knows the group"
        assert self.may_load.wait(5)
        if group_id in self.fails_to_load:
            raise UnavailableError("rank 0: out of memory")
        self.states[group_id] = admin_pb2.GROUP_STATE_READY
        self._do("add", group_id)
        return GroupBlocks(10, 0)

    def remove_group(self, group_id, report):
        assert group_id not in self.kept, "it might be rebuilt meanwhile"
        report(7)
        assert self.may_leave.wait(5)
        if group_id in self.cannot_leave:
            raise FailedPreconditionError(f"group {group_id} is the last one that serves")
        del self.states[group_id]
        self._do("remove", group_id)

    def status(self):
        groups = [
            admin_pb2.GroupStatus(group_id=group_id, state=state, num_running=self.loads.get(group_id, 0))
            for group_id, state in self.states.items()
        ]
        return admin_pb2.GetStatusResponse(groups=groups)

    # As Recovery

    def join(self, group_id, build):
        self.kept.add(group_id)
        try:
            return build()
        except UnavailableError:
            self.kept.remove(group_id)
            raise

    def release(self, group_id):
        self.kept.remove(group_id)

    def keep(self, group_id):
        self.kept.add(group_id)

    def remove(self, group_id):
        assert group_id not in self.kept

    def _do(self, *what):
        with self._lock:
            self.done.append(what)

    def scale(self, *size):
        return [progress.message for progress in self.scaler.scale(*size)]


@pytest.mark.parametrize("fails", [False, True])
def test_who_hears_the_last_word_of_a_change_may_ask_for_the_next(fails):
    world, next_ones = World(), []

    def ask_for_the_next(line):
        if line.startswith(("there are 2", "the change of scale failed")):
            next_ones.append(world.scaler.scale(3))

    world.fails_to_load |= {1} if fails else set()
    world.on_line = ask_for_the_next
    if fails:
        with pytest.raises(UnavailableError):
            world.scale(2)
    else:
        world.scale(2)
    [asked] = next_ones
    assert "there are 3 group(s) of 1 rank(s) now" in list(asked)[-1].message


def test_new_groups_start_all_at_once_beside_the_old_ones():
    world = World()
    news = list(world.scaler.scale(3))
    assert world.done[0] == ("ranks", 1, 2)
    assert sorted(world.done[1:]) == [("add", 1), ("add", 2)]
    assert (news[-1].num_ready_groups, news[-1].num_groups) == (3, 3)
    assert "there are 3 group(s) of 1 rank(s) now" in news[-1].message
    assert [each.message for each in news] == world.said
    assert world.kept == {0, 1, 2}
    assert world.scaler.target == Scale(3, 1)


def test_the_least_loaded_leave_and_their_ranks_end_when_nothing_of_them_is_left():
    world = World(num_groups=4)
    world.loads = {0: 5, 1: 2, 2: 9, 3: 2}
    said = world.scale(2)
    for group_id in (1, 3):
        assert world.done.index(("remove", group_id)) < world.done.index(("end", group_id))
        assert f"group {group_id} drains: 7 sequence(s) left" in said
        assert f"group {group_id} has left" in said
    assert (sorted(world.sizes), world.kept) == ([0, 2], {0, 2})


def test_numbers_are_not_used_again():
    world = World()
    world.scale(2)
    world.scale(1)
    world.scale(2)
    assert sorted(world.sizes) == [0, 2]


def test_groups_of_another_size_all_serve_before_any_old_one_leaves():
    world = World(num_groups=2)
    world.scale(0, 2)
    first_gone = min(world.done.index(("remove", group_id)) for group_id in (0, 1))
    assert first_gone > max(world.done.index(("add", group_id)) for group_id in (2, 3))
    assert world.sizes == {2: 2, 3: 2}
    assert world.scaler.target == Scale(2, 2)
    world.scale(1, 4)
    assert world.sizes == {4: 4}


def test_a_group_that_does_not_start_has_the_whole_change_undone():
    world = World(num_groups=2)
    world.fails_to_load = {3}
    with pytest.raises(UnavailableError, match="group 3 did not start, and nothing has changed: rank 0: out of memory"):
        world.scale(4)
    assert (sorted(world.sizes), world.kept, sorted(world.states)) == ([0, 1], {0, 1}, [0, 1])
    assert world.scaler.target == Scale(2, 1)
    assert world.said[-1].startswith("the change of scale failed: group 3 did not start")
    world.scale(3)


def test_where_new_groups_do_not_start_the_old_ones_of_another_size_stay():
    world = World()
    world.fails_to_load = {1}
    with pytest.raises(UnavailableError):
        world.scale(1, 2)
    assert world.sizes == {0: 1}
    assert world.scaler.target == Scale(1, 1)


def test_what_came_stays_where_it_is_all_that_serves():
    world = World()
    world.fails_to_load, world.cannot_leave = {1}, {2}  # and group 0 failed meanwhile
    with pytest.raises(UnavailableError, match="group 1 did not start, and group 2 had to stay"):
        world.scale(3)
    assert (sorted(world.sizes), world.kept) == ([0, 2], {0, 2})


def test_a_group_that_cannot_leave_stays_and_is_rebuilt_as_before():
    world = World(num_groups=2)
    world.cannot_leave = {1}
    with pytest.raises(FailedPreconditionError, match="group 1 is the last one that serves"):
        world.scale(1)
    assert (sorted(world.sizes), world.kept) == ([0, 1], {0, 1})
    assert world.scaler.target == Scale(2, 1)


def test_one_change_at_a_time_and_it_goes_on_without_its_caller():
    world = World()
    world.may_load.clear()
    news = world.scaler.scale(2)
    next(news)
    assert not world.scaler.is_settled
    with pytest.raises(FailedPreconditionError, match=r"another change is under way, to 2 group\(s\) of 1 rank\(s\)"):
        world.scale(3)
    news.close()
    world.may_load.set()
    while not world.scaler.is_settled:
        threading.Event().wait(0.01)
    assert sorted(world.sizes) == [0, 1]
    world.scale(1)


@pytest.mark.parametrize(
    ("size", "error", "words"),
    [
        ((), InvalidArgumentError, "give num_groups, tensor_parallel_size or both"),
        ((1025,), InvalidArgumentError, r"num_groups must be in \[1, 1024\], got 1025"),
        ((2, 1025), InvalidArgumentError, r"tensor_parallel_size must be in \[1, 1024\], got 1025"),
        ((2, 3), InvalidArgumentError, "tensor_parallel_size 3 does not split the model"),
        (
            (9,),
            FailedPreconditionError,
            r"7 more group\(s\) need 7 place\(s\), and 6 are free beside the 2 group\(s\) of 1",
        ),
        ((0, 4), FailedPreconditionError, r"no room for 2 group\(s\) of 4 rank\(s\): 2 more group\(s\) need 8 place"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_begins(size, error, words):
    world = World(num_groups=2)
    with pytest.raises(error, match=words):
        world.scaler.scale(*size)
    assert (world.done, world.said) == ([], [])
    world.scale(3)


def test_bounds_of_autoscaling_bind_everybody():
    world = World(num_groups=2, least=2, most=3, is_autoscaling=True)
    for num_groups in (1, 4):
        with pytest.raises(InvalidArgumentError, match=r"in \[2, 3\], as --min-num-groups and --max-num-groups say"):
            world.scaler.scale(num_groups)
    world.scale(3)


def test_a_group_that_is_given_up_is_replaced():
    world = World(num_groups=3, num_places=3)
    world.given_up = [1]
    world.scale(3)
    assert world.done[:3] == [("remove", 1), ("end", 1), ("ranks", 3)]
    assert sorted(world.sizes) == [0, 2, 3]


def test_nothing_begins_when_the_server_ends():
    world = World()
    world.scaler.stop()
    with pytest.raises(UnavailableError, match="the server is ending"):
        world.scaler.scale(2)


def of(*groups) -> list[GroupNow]:
    return [GroupNow(group_id, size, condition, load) for group_id, (size, condition, load) in enumerate(groups)]


def test_what_a_change_comes_to():
    three = of((1, SERVES, 0), (1, SERVES, 0), (1, SERVES, 4))
    assert plan_change(Scale(3, 1), three) == Change((), 0, ())
    assert plan_change(Scale(5, 1), three) == Change((), 2, ())
    assert plan_change(Scale(2, 1), three) == Change((), 0, (1,))  # of equals the newest
    assert plan_change(Scale(1, 1), three) == Change((), 0, (1, 0))
    assert plan_change(Scale(2, 2), three) == Change((), 2, (0, 1, 2))
    mixed = of((1, SERVES, 0), (2, SERVES, 0), (2, GIVEN_UP, 0))  # as a change that broke off leaves them
    assert plan_change(Scale(2, 2), mixed) == Change((2,), 1, (0,))


def test_groups_that_are_being_rebuilt_are_left_alone():
    groups = of((1, SERVES, 0), (1, SERVES, 0), (1, MENDED, 0))
    assert plan_change(Scale(2, 1), groups).leaving == (1,)
    assert plan_change(Scale(4, 1), groups).num_new == 1
    with pytest.raises(FailedPreconditionError, match=r"no group would be left that serves: the 1 other\(s\)"):
        plan_change(Scale(1, 1), groups)
    with pytest.raises(FailedPreconditionError, match="group 2 is being rebuilt; try again when it serves"):
        plan_change(Scale(1, 2), groups)
