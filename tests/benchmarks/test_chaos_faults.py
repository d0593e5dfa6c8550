"""Each fault does what it says, and its detection and recovery are read from the status: processes that only sleep, and
a canned Admin door in the place of a server."""

import asyncio
import subprocess
import time

import grpc
import psutil
import pytest
from octavo.benchmarks.chaos import faults
from octavo.benchmarks.chaos.faults import FaultMaker
from octavo.benchmarks.chaos.load import Load
from octavo.benchmarks.chaos.orders import Orders
from octavo.benchmarks.chaos.script import Shape, parse_script
from octavo.benchmarks.chaos.watch import StatusWatch
from octavo.proto import admin_pb2, admin_pb2_grpc

READY, FAILED = admin_pb2.GROUP_STATE_READY, admin_pb2.GROUP_STATE_FAILED
SHAPE = Shape(num_groups=1, tensor_parallel_size=2, num_gateways=2)


class Admin(admin_pb2_grpc.AdminServicer):
    """Says what the test puts in `status`; nobody answers while it is None."""

    def __init__(self) -> None:
        self.started = time.monotonic() - 100.0
        self.status = admin_pb2.GetStatusResponse(num_gateways=2)
        self.add_group(7)

    def add_group(self, group_id: int) -> None:
        ranks = [admin_pb2.RankStatus(rank=rank, address=f"127.0.0.1:{rank}") for rank in range(2)]
        self.status.groups.add(group_id=group_id, state=READY, epoch=1, ranks=ranks)

    async def GetStatus(self, request, context):
        if self.status is None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
        self.status.uptime_s = time.monotonic() - self.started
        return self.status

    async def Scale(self, request, context):
        if request.num_groups > 2:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "no room")
        self.add_group(8)
        yield admin_pb2.ScaleProgress(message="a group more")


class Server:
    """Four processes that sleep."""

    def __init__(self, address: str, orders) -> None:
        self.address, self._orders = address, orders
        self._started = [subprocess.Popen(["sleep", "60"]) for _ in range(4)]
        self.ranks = [psutil.Process(process.pid) for process in self._started[:2]]
        self.others = [psutil.Process(process.pid) for process in self._started[2:]]

    def rank_at(self, address: str) -> psutil.Process:
        return self.ranks[int(address.rpartition(":")[2])]

    def gateways(self):
        return self.others

    def processes_of(self, kind: str):
        return self.others[:1]

    def orders_for(self, process: psutil.Process) -> Orders:
        return Orders(self._orders, process.pid)

    def close(self) -> None:
        for process in self._started:
            process.kill()
            process.wait()


def is_dead(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@pytest.fixture
def make(tmp_path):
    """make(line of a script, what goes on meanwhile: takes admin and server) -> FaultRecord, the server."""
    servers = []

    async def run(line, meanwhile):
        door, admin = grpc.aio.server(), Admin()
        admin_pb2_grpc.add_AdminServicer_to_server(admin, door)
        address = f"unix:{tmp_path}/door.sock"
        door.add_insecure_port(address)
        await door.start()
        server, watch = Server(address, tmp_path), StatusWatch(address)
        servers.append(server)
        maker = FaultMaker(server, watch, Load(address, [], 0, 0), SHAPE)
        watching = asyncio.create_task(watch.run())
        try:
            assert await watch.wait_until(maker.is_whole, 10) is not None
            [fault] = parse_script(line)
            beside = asyncio.create_task(meanwhile(admin, server))
            record = await maker.make(fault)
            await beside
            return record, server
        finally:
            watching.cancel()
            await door.stop(0)

    yield lambda line, meanwhile: asyncio.run(asyncio.wait_for(run(line, meanwhile), 60))
    for server in servers:
        server.close()


async def nothing(admin, server):
    pass


async def until(condition):
    while not condition():
        await asyncio.sleep(0.01)


async def fails_and_comes_back(admin):
    group = admin.status.groups[0]
    group.state = FAILED
    await asyncio.sleep(0.3)
    group.state, group.epoch = READY, 2


def check_times(record):
    assert record.problem == ""
    assert 0 <= record.noticed_after_s < record.whole_after_s
    assert record.whole_after_s >= 0.2


def test_a_rank_is_killed(make):
    async def meanwhile(admin, server):
        await until(lambda: is_dead(server.ranks[1]))
        await fails_and_comes_back(admin)

    record, server = make("at 1 kill-rank group=0 rank=1", meanwhile)
    check_times(record)
    assert not is_dead(server.ranks[0])


def test_a_rank_is_stopped_for_good(make):
    async def meanwhile(admin, server):
        await until(lambda: server.ranks[0].status() == psutil.STATUS_STOPPED)
        await fails_and_comes_back(admin)

    record, server = make("at 1 stop-rank group=0 rank=0", meanwhile)
    check_times(record)
    assert server.ranks[0].status() == psutil.STATUS_STOPPED


@pytest.mark.parametrize("line", ["at 1 stop-rank group=0 rank=0 seconds=0.4", "at 1 stop-coordinator seconds=0.4"])
def test_a_process_is_stopped_and_goes_on_unnoticed(make, line):
    record, server = make(line, nothing)
    assert (record.noticed_after_s, record.problem) == (None, "")
    assert record.whole_after_s >= 0.4
    assert not [process for process in (*server.ranks, *server.others) if process.status() == psutil.STATUS_STOPPED]


def test_an_order_is_obeyed_before_the_time_counts(make, tmp_path):
    async def meanwhile(admin, server):
        orders = server.orders_for(server.ranks[0])
        await until(lambda: orders.is_given)
        await asyncio.sleep(0.3)
        assert orders.take("drop-reply")
        await fails_and_comes_back(admin)

    record, _ = make("at 1 drop-reply group=0", meanwhile)
    check_times(record)
    assert record.made_at_s >= 0.3


def test_an_order_that_nobody_obeys_is_taken_back(make, monkeypatch):
    monkeypatch.setattr(faults, "_ORDER_LIMIT_S", 0.2)
    record, server = make("at 1 raise group=0 rank=1", nothing)
    assert record.problem == "the rank has made no step within 0 s"
    assert not server.orders_for(server.ranks[1]).is_given


def test_a_coordinator_is_killed_and_another_follows(make):
    async def meanwhile(admin, server):
        await until(lambda: is_dead(server.others[0]))
        status, admin.status = admin.status, None
        await asyncio.sleep(0.3)
        admin.status, admin.started = status, time.monotonic()

    record, _ = make("at 1 kill-coordinator", meanwhile)
    check_times(record)


def test_a_coordinator_is_stopped_for_good_and_another_follows_when_it_was_ended(make):
    async def meanwhile(admin, server):
        await until(lambda: server.others[0].status() == psutil.STATUS_STOPPED)
        status, admin.status = admin.status, None
        await asyncio.sleep(0.3)
        server.others[0].kill()
        admin.status, admin.started = status, time.monotonic()

    record, _ = make("at 1 stop-coordinator", meanwhile)
    assert record.problem == ""
    assert record.noticed_after_s >= 0.3


def test_a_gateway_is_killed_and_another_follows(make):
    async def meanwhile(admin, server):
        await until(lambda: is_dead(server.others[1]))
        await asyncio.sleep(0.3)  # nobody has missed it yet: two are counted
        admin.status.num_gateways = 1
        await asyncio.sleep(0.3)
        admin.status.num_gateways = 2

    record, server = make("at 1 kill-gateway gateway=1", meanwhile)
    check_times(record)
    assert record.whole_after_s >= 0.5
    assert not is_dead(server.others[0])


def test_the_server_is_scaled_and_whole_with_another_number_of_groups(make):
    record, _ = make("at 1 scale groups=2", nothing)
    assert (record.noticed_after_s, record.problem) == (None, "")
    assert record.whole_after_s is not None


def test_what_the_server_refuses_or_does_not_have_is_a_problem(make):
    record, _ = make("at 1 scale groups=3", nothing)
    assert "no room" in record.problem
    record, _ = make("at 1 kill-rank group=1 rank=0", nothing)
    assert record.problem == "the server has only 1 groups"
    record, _ = make("at 1 kill-rank group=0 rank=9", nothing)
    assert record.problem == "group 7 has only 2 ranks"
    record, _ = make("at 1 kill-gateway gateway=2", nothing)
    assert record.problem == "the server has no gateway 2"


def test_a_server_that_does_not_recover_is_a_problem(make, monkeypatch):
    monkeypatch.setattr(faults, "RECOVERY_LIMIT_S", 0.6)

    async def meanwhile(admin, server):
        admin.status.groups[0].state = FAILED

    record, _ = make("at 1 kill-rank group=0 rank=0", meanwhile)
    assert record.problem == "the server has not recovered within 1 s"
    assert record.noticed_after_s is not None
    assert record.whole_after_s is None
