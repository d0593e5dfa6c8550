"""A process that comes back: started anew when it dies, as often and as soon as its policy says. And its heartbeat."""

from collections.abc import Callable
from dataclasses import dataclass

import grpc

from ..errors import UnavailableError
from .child_process import ChildProcess
from .restart_policy import WINDOW_S, RestartPolicy

# A coordinator answers between two steps and a gateway between two messages, so two answers in a row that take so long
# are no load: it hangs. Two, since one may be late because this process stood still.
_ANSWER_S = 4.0
_NUM_MISSED = 2
_ASK_S = 1.0


@dataclass(slots=True)
class _Downtime:
    """From the end of a process until another serves in its place."""

    what: str  # how the last one ended
    since: float
    starts_at: float | None  # None: the next one has been started


class KeptProcess:
    """Owner of one process after another. `tend` is called often and waits for nothing; times are of one clock."""

    def __init__(
        self,
        child: ChildProcess,
        start: Callable[[], ChildProcess],
        serves: Callable[[], bool],
        heartbeat: "Heartbeat",
        policy: RestartPolicy,
        say: Callable[[str], None],
    ) -> None:
        """`start` starts another, `serves` says whether that one does its work, `heartbeat` whether it does anything,
        `say` shows a line."""
        self.child = child
        self._start, self._serves, self._heartbeat = start, serves, heartbeat
        self._policy, self._say = policy, say
        self._downtime: _Downtime | None = None

    @property
    def is_down(self) -> bool:
        return self._downtime is not None

    def tend(self, now: float) -> None:
        """Does what there is to do. Raises UnavailableError when the process has died too often."""
        if self._downtime is None or self._downtime.starts_at is None:
            self._look(now)
        if self._downtime is None:
            return
        if self._downtime.starts_at is None:
            if self._serves():
                self._note_service(self._downtime, now)
        elif self._downtime.starts_at <= now:
            self._downtime.starts_at = None
            self._heartbeat.reset()
            self.child = self._start()

    def _look(self, now: float) -> None:
        if self.child.has_ended:
            self._note_end(self.child.describe_end(), now)
        elif self._heartbeat.has_stopped(now):
            self.child.kill()
            self._note_end(f"{self.child.name} {self._heartbeat.words}", now)

    def _note_end(self, what: str, now: float) -> None:
        self.child.reap()
        delay_s = self._policy.delay_s(now)
        if delay_s is None:
            within = f"{self._policy.num_failures} time(s) within {WINDOW_S / 60:.0f} minutes"
            raise UnavailableError(f"{self.child.name} failed {within} and is given up; the last time: {what}")
        since = self._downtime.since if self._downtime is not None else now
        self._downtime = _Downtime(what, since, now + delay_s)

    def _note_service(self, downtime: _Downtime, now: float) -> None:
        self._downtime = None
        self._policy.serves(now)
        self._say(f"{downtime.what}; started anew, serves again after {now - downtime.since:.1f} s")


class Heartbeat:
    """Finds a process that lives and does not answer."""

    def __init__(self, ask: Callable[[float], grpc.Future]) -> None:
        """`ask(timeout_s)` begins a call that ends with DEADLINE_EXCEEDED after so long."""
        self._ask = ask
        self._call: grpc.Future | None = None
        self._asked_at = 0.0
        self._num_missed = 0

    def has_stopped(self, now: float) -> bool:
        """Whether it hangs; asks again when it is time. To be called often."""
        if self._call is not None and self._call.done():
            self._take(self._call)
            self._call = None
        if self._call is None and now >= self._asked_at + _ASK_S:
            self._asked_at = now
            self._call = self._ask(_ANSWER_S)
        return self._num_missed >= _NUM_MISSED

    def _take(self, call: grpc.Future) -> None:
        """Any other error is of a process that has ended, or is only starting: not ours to find."""
        error = call.exception()
        is_late = error is not None and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        self._num_missed = self._num_missed + 1 if is_late else 0

    @property
    def words(self) -> str:
        return f"did not answer for {_NUM_MISSED * _ANSWER_S:.0f} s, and was killed"

    def reset(self) -> None:
        """Another process is to answer."""
        self._call, self._num_missed = None, 0
