"""What has ended on a stream of transfers, and which steps wait for it; here streams and events are lists.

On a GPU: tests/workers/test_host_tier.py and test_moved_blocks.py.
"""

from contextlib import contextmanager

import pytest
import torch
from octavo.errors import ResourceExhaustedError
from octavo.workers.host_memory import host_memory
from octavo.workers.transfer_stream import TransferStream

CUDA = torch.device("cuda:0")


class FakeGpu:
    """Notes what streams are asked to wait for. Transfers run until `end`, or until the host waits for them."""

    def __init__(self, monkeypatch) -> None:
        gpu = self
        self.waits = []  # events that the steps' stream was told to wait for
        self.num_synchronized = 0
        self.num_joined = 0  # times the transfers' stream waited for the steps'
        self.events = []

        class Event:
            has_ended = False

            def record(self) -> None:
                gpu.events.append(self)

            def query(self) -> bool:
                return self.has_ended

            def synchronize(self) -> None:
                gpu.num_synchronized += 1
                gpu.end(gpu.events.index(self) + 1)

        class Stream:
            def __init__(self, device=None) -> None:
                pass

            def wait_stream(self, stream) -> None:
                assert stream is gpu.steps
                gpu.num_joined += 1

            def wait_event(self, event) -> None:
                gpu.waits.append(event)

        @contextmanager
        def use(stream):
            yield

        self.steps = Stream()
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "stream", use)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.steps)

    def end(self, count) -> None:
        """The first `count` transfers have ended."""
        for event in self.events[:count]:
            event.has_ended = True


@pytest.fixture
def gpu(monkeypatch):
    return FakeGpu(monkeypatch)


@pytest.fixture
def transfers(gpu):
    """Of the steps 2, 5 and 6; all running."""
    stream = TransferStream(CUDA)
    for step_id in (2, 5, 6):
        with stream.behind_steps(step_id):
            pass
    assert gpu.num_joined == 3
    return stream


def test_asking_what_has_ended_waits_for_nothing(gpu, transfers):
    found = []
    for count in range(4):
        gpu.end(count)
        found.append(transfers.finished())
    assert found == [0, 2, 5, 6]
    assert gpu.num_synchronized == 0


@pytest.mark.parametrize(("awaited", "finished"), [(1, 0), (2, 2), (4, 2), (5, 5), (100, 6)])
def test_asking_waits_for_a_step_s_own_and_those_before(awaited, finished, gpu, transfers, monkeypatch):
    waits = []

    def sleep(duration_s):
        """The next transfer ends meanwhile."""
        waits.append(duration_s)
        gpu.end(len(waits))

    monkeypatch.setattr("octavo.workers.transfer_stream.time.sleep", sleep)
    assert transfers.finished(awaited) == finished
    num_waits = len(waits)
    assert num_waits == sum(step_id <= awaited for step_id in (2, 5, 6))
    assert transfers.finished(awaited) == finished
    assert len(waits) == num_waits, "nothing is waited for twice"


def test_asking_waits_no_longer_than_until_another_step_is_queued(gpu, transfers, monkeypatch):
    monkeypatch.setattr("octavo.workers.transfer_stream.time.sleep", lambda duration_s: transfers.note_step(7))
    transfers.note_step(6)
    assert transfers.finished(awaited=6) == 0


def test_steps_wait_for_the_last_transfers_that_they_count_on(gpu, transfers):
    for step_id in (0, 1, 2, 4, 5, 9):
        transfers.hold_steps(step_id)
    first, second, third = gpu.events
    assert gpu.waits == [first, first, second, third]
    assert gpu.num_synchronized == 0


def test_steps_do_not_wait_for_what_is_known_to_have_ended(gpu, transfers):
    gpu.end(2)
    assert transfers.finished() == 5
    transfers.hold_steps(5)
    assert gpu.waits == []


@pytest.fixture
def cudart(monkeypatch):
    """CUDA's runtime: what was pinned, and the error of the next try."""

    class Cudart:
        pinned, error = (), 0

        def cudaHostRegister(self, address, num_bytes, flags):
            self.pinned = (address, num_bytes)
            return self.error

    fake = Cudart()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: fake)
    return fake


def test_memory_for_a_gpu_is_pinned_to_the_byte(cudart):
    memory = host_memory(5000, CUDA)
    assert cudart.pinned == (memory.data_ptr(), 5000)
    assert not memory.any()
    memory.fill_(7)  # it is there, and its pages outlive what made them
    assert memory.view(torch.int64).eq(0x0707070707070707).all()


def test_memory_that_cannot_be_pinned_is_refused(cudart):
    cudart.error = 2
    with pytest.raises(ResourceExhaustedError) as error:
        host_memory(3 << 20, CUDA)
    assert str(error.value) == (
        "cannot pin 3.0 MiB of host memory for the swap space (CUDA error 2); lower --swap-space"
    )
