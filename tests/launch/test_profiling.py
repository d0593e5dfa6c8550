"""`octavo profile` against workers that answer as told: the table, the trace's path, and each refusal in one line."""

import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from octavo.launch import cli
from octavo.proto import admin_pb2, worker_pb2, worker_pb2_grpc


class FakeWorker(worker_pb2_grpc.WorkerServicer):
    """Answers Profile with one kernel; when `is_idle`, not before the caller gives up."""

    def __init__(self) -> None:
        self.requests = []
        self.refusal = ""
        self.is_idle = False

    def Profile(self, request, context):
        self.requests.append(request)
        if self.refusal:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, self.refusal)
        if self.is_idle:
            ended = threading.Event()
            assert not context.add_callback(ended.set) or ended.wait(20)
        kernel = worker_pb2.KernelTime(name="decode_attention", calls=16, time_us=320.5, mean_us=20.03)
        return worker_pb2.ProfileResponse(
            num_steps=request.num_steps, span_us=800, idle_us=200, step_gaps_us=[1, 9, 2], kernels=[kernel]
        )


@pytest.fixture
def worker(fake_server, tmp_path):
    """Rank 0 of groups 0 and 1 of the fake server."""
    fake, address = FakeWorker(), f"unix:{tmp_path}/worker.sock"
    server = grpc.server(ThreadPoolExecutor(4))
    worker_pb2_grpc.add_WorkerServicer_to_server(fake, server)
    server.add_insecure_port(address)
    server.start()
    for group_id in range(2):
        group = fake_server.status.groups.add(group_id=group_id, state=admin_pb2.GROUP_STATE_READY)
        group.ranks.add(rank=0, device=f"cuda:{group_id}", address=address)
    yield fake
    server.stop(None).wait()


@pytest.fixture
def profile(fake_server, tmp_path, capsys):
    """profile(*options) -> (exit status, stdout, stderr)."""

    def run(*options):
        status = cli.run(["profile", "--address", fake_server.address, "--out", str(tmp_path / "traces"), *options])
        return status, *capsys.readouterr()

    return run


def test_kernels_idle_time_and_the_trace_are_shown(profile, worker, tmp_path):
    status, out, _ = profile("--group", "1", "--num-steps", "7")
    assert status == 0
    for part in ("decode_attention", "16.00", "320.5", "20.03", "800.0 us", "200.0 us (25%)", "p50 2.0", "max 9.0"):
        assert part in out
    path = str(tmp_path / "traces" / "group-1-rank-0.json")
    assert path in out
    assert [(request.num_steps, request.trace_path) for request in worker.requests] == [(7, path)]


def test_all_groups_are_profiled_each_to_its_own_file(profile, worker):
    status, out, _ = profile()
    assert (status, out.count("decode_attention")) == (0, 2)
    assert len({request.trace_path for request in worker.requests}) == 2


def test_a_group_that_does_not_run_is_one_line(profile, worker):
    worker.is_idle = True
    status, _, err = profile("--timeout", "0.2", "--group", "0")
    assert (status, err.count("\n")) == (1, 1)
    assert "did not run 64 steps within 0.2 s" in err


def test_ranks_on_the_cpu_are_refused(profile, worker, fake_server):
    fake_server.status.groups[0].ranks[0].device = "cpu"
    status, _, err = profile()
    assert (status, err.count("\n"), worker.requests) == (1, 1, [])
    assert "only a GPU's steps can be profiled" in err


def test_a_workers_refusal_is_repeated(profile, worker):
    worker.refusal = "a profile runs already"
    status, _, err = profile("--group", "0")
    assert (status, err) == (1, "octavo: group 0 cannot be profiled: a profile runs already\n")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--group", "5"), "no group 5; the server's groups: 0, 1"),
        (("--num-steps", "0"), "num_steps must be in"),
        (("--timeout", "0"), "timeout must be over 0"),
    ],
)
def test_wrong_options_are_one_line(profile, worker, options, said):
    status, _, err = profile(*options)
    assert (status, err.count("\n")) == (1, 1)
    assert said in err
