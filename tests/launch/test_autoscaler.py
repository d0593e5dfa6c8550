"""The thread that looks at the load and asks for changes of scale."""

import threading
from dataclasses import dataclass, field

import pytest
from octavo.errors import FailedPreconditionError
from octavo.launch import autoscaler
from octavo.launch.autoscaler import Autoscaler
from octavo.proto import admin_pb2


@dataclass
class Policy:
    """Wants so many groups."""

    wanted: int | None = None
    changes: int = 0
    failures: int = 0

    def decide(self, load, now):
        return self.wanted

    def note_change(self):
        self.changes += 1
        self.wanted = None

    def note_failure(self, now):
        self.failures += 1
        self.wanted = None


@dataclass
class Scaler:
    is_settled: bool = True
    error: Exception | None = None
    asked: list = field(default_factory=list)

    def scale(self, num_groups):
        self.asked.append(num_groups)
        if self.error is not None:
            raise self.error
        yield admin_pb2.ScaleProgress(message="done")


@pytest.fixture
def looks(monkeypatch):
    """looks(policy, scaler): what is said by the time that it has looked some more times."""
    monkeypatch.setattr(autoscaler, "_LOOK_S", 0.001)

    def look(policy, scaler):
        said, seen = [], threading.Semaphore(0)

        def status():
            seen.release()
            return admin_pb2.GetStatusResponse(num_waiting=3)

        running = Autoscaler(scaler, policy, status, 16, said.append)
        for _ in range(10):
            assert seen.acquire(timeout=5)
        running.stop()
        return said

    return look


def test_what_the_policy_wants_is_asked_for_once(looks):
    policy, scaler = Policy(wanted=2), Scaler()
    assert looks(policy, scaler) == ["autoscaling to 2 group(s): 3 wait, 0 run"]
    assert (scaler.asked, policy.changes, policy.failures) == ([2], 1, 0)


def test_nothing_is_asked_for_while_groups_change_or_are_rebuilt(looks):
    scaler = Scaler(is_settled=False)
    assert looks(Policy(wanted=2), scaler) == []
    assert scaler.asked == []


def test_a_refusal_is_said_and_not_asked_for_again_at_once(looks):
    policy, scaler = Policy(wanted=2), Scaler(error=FailedPreconditionError("Ray has no room"))
    assert looks(policy, scaler)[1:] == ["autoscaling: Ray has no room"]
    assert (scaler.asked, policy.changes, policy.failures) == ([2], 0, 1)
