"""What a profile says of the device's events: time by kernel and idle time, both per step."""

import threading

import pytest
import torch
from octavo.errors import FailedPreconditionError
from octavo.workers import step_pipeline
from octavo.workers.profiler import DeviceEvent, StepProfiler, summarise
from octavo.workers.step_pipeline import StepPipeline

COPY = "Memcpy HtoD (Pinned -> Device)"


def test_times_are_per_step_and_idle_is_what_lies_between():
    events = [
        DeviceEvent("matmul", 2.0, 12.0),
        DeviceEvent(COPY, 0.0, 2.0),
        DeviceEvent("norm", 13.0, 14.0),
        DeviceEvent(COPY, 20.0, 22.0),
        DeviceEvent("matmul", 22.0, 34.0),
        DeviceEvent("on another stream", 24.0, 26.0),
        DeviceEvent("norm", 34.0, 36.0),
    ]
    found = summarise(events, num_steps=2)
    assert (found.num_steps, found.span_us, found.idle_us) == (2, 18.0, 3.5)
    assert list(found.step_gaps_us) == [6.0]
    rows = [(kernel.name, kernel.calls, kernel.time_us, kernel.mean_us) for kernel in found.kernels]
    assert rows == [
        ("matmul", 1.0, 11.0, 11.0),
        (COPY, 1.0, 2.0, 2.0),
        ("norm", 1.0, 1.5, 1.5),
        ("on another stream", 0.5, 1.0, 2.0),
    ]


def test_a_device_that_did_nothing_is_said_so():
    with pytest.raises(FailedPreconditionError, match="nothing ran"):
        summarise([], num_steps=1)


def test_a_cpu_is_refused(tmp_path):
    with pytest.raises(FailedPreconditionError, match="runs on the CPU"):
        StepProfiler(torch.device("cpu"), 1, tmp_path / "trace.json")


def test_a_rank_says_that_it_profiles_from_when_it_is_asked(tmp_path, monkeypatch):
    """To start takes seconds the first time, in which its steps are late; nobody may take it for hung."""
    may_start, pipeline = threading.Event(), StepPipeline(torch.device("cpu"), 1)

    def start(*arguments):
        may_start.wait(10)
        raise FailedPreconditionError("there is nothing to profile")

    monkeypatch.setattr(step_pipeline, "StepProfiler", start)
    asked = pipeline.profile(1, tmp_path / "trace.json")
    assert pipeline.is_profiling
    may_start.set()
    with pytest.raises(FailedPreconditionError, match="nothing to profile"):
        asked.result(10)
    pipeline.call(lambda: None).result(10)  # behind it
    assert not pipeline.is_profiling
    pipeline.close_launcher()
    pipeline.close_waiter()
