"""Which groups there are, and where new ones may have their weights from."""

from dataclasses import dataclass

import pytest
from octavo.errors import UnavailableError
from octavo.launch.config import ServeConfig
from octavo.launch.groups import GroupSettings, WorkerGroups, nearest_source
from octavo.launch.resolve import resolve_model, resolve_placement
from octavo.proto import admin_pb2


@dataclass
class Rank:
    address: str
    node_id: str
    device: str = "cpu"
    store_address: str = "s:1"


class Cluster:
    """Remembers ranks by group; on which nodes, a test says."""

    def __init__(self):
        self.ranks, self.nodes, self.fails = {}, {}, False

    def start_groups(self, group_ids, num_ranks, device):
        if self.fails:
            raise UnavailableError("a rank did not start")
        for group_id in group_ids:
            nodes = self.nodes.get(group_id, ["a"] * num_ranks)
            self.ranks[group_id] = [Rank(f"{group_id}:{rank}", node) for rank, node in enumerate(nodes)]

    def end_group(self, group_id):
        del self.ranks[group_id]

    def endpoints(self, group_id):
        return self.ranks[group_id]


class Control:
    def __init__(self):
        self.serving = set()
        self.is_dead = False

    def status(self):
        if self.is_dead:
            raise UnavailableError("connection refused")
        ready, draining = admin_pb2.GROUP_STATE_READY, admin_pb2.GROUP_STATE_DRAINING
        states = {group_id: ready if group_id in self.serving else draining for group_id in range(9)}
        return admin_pb2.GetStatusResponse(
            groups=[admin_pb2.GroupStatus(group_id=group_id, state=state) for group_id, state in states.items()]
        )


@pytest.fixture
def cluster():
    return Cluster()


@pytest.fixture
def control():
    return Control()


@pytest.fixture
def groups(cluster, control, write_model):
    config = ServeConfig(model=str(write_model()), load_format="dummy")
    model = resolve_model(config)
    return WorkerGroups(cluster, control, GroupSettings(config, model, resolve_placement(config, model.config, 0)))


def sources(groups, group_id):
    return [worker.weight_source for worker in groups.request(group_id).workers]


def test_numbers_are_given_once_also_after_a_start_that_failed(groups, cluster):
    assert groups.start_ranks(2, 1) == [0, 1]
    groups.end(1)
    cluster.fails = True
    with pytest.raises(UnavailableError):
        groups.start_ranks(1, 1)
    cluster.fails = False
    assert groups.start_ranks(1, 2) == [3]
    assert groups.sizes == {0: 1, 3: 2}


def test_weights_come_from_a_group_of_the_same_size_that_serves(groups, control):
    groups.start_ranks(1, 2)
    assert sources(groups, 0) == ["", ""]
    groups.start_ranks(2, 1)
    control.serving = {0, 1}
    assert sources(groups, 2) == ["1:0"]
    assert sources(groups, 1) == [""]  # the other one does not serve
    groups.start_ranks(1, 2)
    assert sources(groups, 3) == ["0:0", "0:1"]


def test_weights_come_from_the_files_while_there_is_no_coordinator_to_ask(groups, control):
    groups.start_ranks(2, 1)
    control.serving, control.is_dead = {0, 1}, True
    assert sources(groups, 1) == [""]


def test_from_the_nearest(groups, cluster, control):
    cluster.nodes = {0: ["a", "b"], 1: ["b", "b"], 2: ["c", "b"], 3: ["b", "b"]}
    groups.start_ranks(4, 2)
    control.serving = {0, 1, 2}
    assert sources(groups, 3) == ["1:0", "1:1"]
    assert nearest_source(cluster.ranks[3], []) == []
