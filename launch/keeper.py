"""Keeps a server up: whatever of its processes dies, comes back, and the rest goes on.

One thread does it, from the moment that the server is ready until its gateways have ended: a drain needs all the rest.
Ranks are rebuilt by launch/recovery.py, on threads of their own.
"""

import threading
import time
from collections.abc import Callable

from ..errors import UnavailableError
from .child_process import ChildProcess
from .engine_control import EngineControl
from .kept_process import KeptProcess
from .recovery import Recovery

_POLL_S = 0.05
_WATCH_S = 0.5
_STOP_TIMEOUT_S = 5.0


class Keeper:
    """Owner of the coordinator and the gateways of a server that is ready. `start`, `watch`, `drain`, `stop`."""

    def __init__(
        self,
        coordinator: KeptProcess,
        gateways: list[KeptProcess],
        recovery: Recovery,
        control: EngineControl,
        require_cluster: Callable[[], None],
        say: Callable[[str], None],
    ) -> None:
        """`require_cluster` raises UnavailableError if what the ranks run in is gone."""
        self._coordinator, self._gateways = coordinator, gateways
        self._recovery, self._control = recovery, control
        self._require_cluster, self._say = require_cluster, say
        self._is_draining = False
        self._lock = threading.Lock()  # of the gateways and of _is_draining
        self._stopping, self._ended = threading.Event(), threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="keeper", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def watch(self) -> None:
        """Returns never: raises UnavailableError when a part of the server is given up that it cannot be without."""
        while not self._ended.wait(_WATCH_S):
            pass
        assert self._failure is not None, "it is watched only until it is stopped"
        raise self._failure

    def drain(self) -> list[ChildProcess]:
        """The gateways are to end, and do not come back; all else does. Returns them."""
        with self._lock:
            self._is_draining = True
            return [gateway.child for gateway in self._gateways]

    @property
    def has_lost_engine(self) -> bool:
        """Whether there is no coordinator any more, and none will come."""
        return self._ended.is_set() and self._coordinator.child.has_ended

    def stop(self) -> ChildProcess:
        """Nothing comes back any more. Returns the coordinator."""
        self._stopping.set()
        self._recovery.stop()
        self._thread.join(_STOP_TIMEOUT_S)
        return self._coordinator.child

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._tend_gateways()
                self._tend_engine()
        except Exception as error:
            self._failure = error
        finally:
            self._ended.set()

    def _tend_gateways(self) -> None:
        with self._lock:
            if self._is_draining:
                return
            self._require_cluster()
            for gateway in list(self._gateways):
                self._tend_gateway(gateway)

    def _tend_gateway(self, gateway: KeptProcess) -> None:
        """One that was sent SIGTERM by itself, or is given up, is not missed while there are others."""
        if gateway.child.was_drained:
            gateway.child.reap()
            self._leave(gateway, "was drained, and has ended")
            return
        try:
            gateway.tend(time.monotonic())
        except UnavailableError as error:
            self._leave(gateway, str(error).removeprefix(f"{gateway.child.name} "))

    def _leave(self, gateway: KeptProcess, what: str) -> None:
        self._gateways.remove(gateway)
        if not self._gateways:
            raise UnavailableError(f"{gateway.child.name} {what}; it was the last one: start the server again")
        self._say(f"{gateway.child.name} {what}; {len(self._gateways)} go on")

    def _tend_engine(self) -> None:
        """The coordinator; then, within a moment, the groups that fail under it."""
        coordinator = self._coordinator
        before = coordinator.child
        coordinator.tend(time.monotonic())
        if coordinator.child is not before:
            self._restore_groups(coordinator.child)
        self._recovery.check()
        self._take_failures()

    def _restore_groups(self, coordinator: ChildProcess) -> None:
        control = self._control
        self._recovery.restore(lambda: control.wait_until_up(coordinator.require_alive))

    def _take_failures(self) -> None:
        is_busy = self._coordinator.is_down or any(gateway.is_down for gateway in self._gateways)
        try:
            known_epochs = self._recovery.known_epochs
            self._recovery.take(self._control.await_failures(known_epochs, _POLL_S if is_busy else _WATCH_S))
        except UnavailableError:  # it has died, or is not there yet
            self._stopping.wait(_POLL_S)
