"""CUDA graphs that hand results to each other, in memory that later ones take over."""

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

NUM_ROWS = 16 * 1024 * 1024  # of float32: 64 MiB, which the allocator cannot hide in what it rounds up


@pytest.fixture
def recorder():
    from octavo.workers.graph_recorder import GraphRecorder

    return GraphRecorder(torch.device("cuda", torch.cuda.current_device()))


def record_chain(recorder, place, length):
    """Recordings that each add 1 to what the one before made; the first doubles what is in `place`."""
    place * 2 + 1  # kernels are loaded before
    with recorder.session():
        recording, (result,) = recorder.record(lambda: (place * 2,))
        recordings = [recording]
        for _ in range(length):
            recording, (result,) = recorder.record(lambda made=result: (made + 1,))
            recordings.append(recording)
    return recordings


def test_each_replay_works_on_what_its_place_holds_then(recorder):
    place = torch.zeros(1000, device="cuda")
    recordings = record_chain(recorder, place, 5)
    for value in (3.0, -1.0):
        place.fill_(value)
        for recording in recordings:
            recording.replay()
        assert recordings[-1].outputs[0].eq(2 * value + 5).all()


def test_results_that_nobody_holds_give_their_memory_to_later_recordings(recorder):
    place = torch.zeros(NUM_ROWS, device="cuda")
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    recordings = record_chain(recorder, place, 8)
    assert torch.cuda.memory_reserved() - before <= 4 * place.nbytes, "two results live at any time"
    place.fill_(1.0)
    for recording in recordings:
        recording.replay()
    assert recordings[-1].outputs[0].eq(10).all()


def test_recordings_are_timed_on_the_device(recorder):
    small, large = torch.zeros(NUM_ROWS // 64, device="cuda"), torch.zeros(NUM_ROWS, device="cuda")
    recordings = [record_chain(recorder, place, 3) for place in (small, large)]
    with recorder.session():
        # The least of several: other processes may use the GPU.
        once, more, longer = (
            min(recorder.time_ms(these, 10) for _ in range(10))
            for these in (recordings[0], recordings[0] * 4, recordings[1])
        )
    assert 0.001 < once < more < 8 * once
    assert longer > 2 * once
