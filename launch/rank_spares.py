"""Spare ranks: processes that are kept ready on each node of a rank, to take the place of one that dies.

Most of what a rank's process takes to start is Python and its imports; a spare has that behind it. It is no rank until
it is taken, and touches no GPU.
"""

import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import Enum
from typing import Generic, Protocol, TypeVar

from ..errors import OctavoError
from .restart_policy import RestartPolicy

_LOOK_S = 1.0
_MAX_WAIT_S = 60.0  # for groups that are being rebuilt: one may never serve again
_STOP_TIMEOUT_S = 3.0


class SpareCondition(Enum):
    """What a spare is good for."""

    BUSY = "busy"  # it starts, or does not answer now
    READY = "ready"
    DEAD = "dead"


class Spare(Protocol):
    """One process."""

    def condition(self) -> SpareCondition:
        """Asks it; may take a few seconds."""
        ...

    def end(self) -> None: ...


SpareT = TypeVar("SpareT", bound=Spare)


@dataclass(slots=True, eq=False)
class _Kept(Generic[SpareT]):
    """A spare that nobody has taken."""

    node_id: str
    spare: SpareT
    was_ready: bool = False


@dataclass(frozen=True, slots=True)
class SpareSettings:
    """How many are kept, and when they start."""

    num_on_node: int
    is_calm: Callable[[], bool]  # whether every group serves: a start takes cores from one that is being rebuilt
    new_policy: Callable[[], RestartPolicy]  # for the spares of one node that die


@dataclass(slots=True)
class _Node:
    """What is known of one node's spares."""

    policy: RestartPolicy
    not_before: float = 0.0  # when the next may start
    is_given_up: bool = False


class SpareRanks(Generic[SpareT]):
    """Owner of the spares. A thread of its own starts them; any other may take them."""

    def __init__(
        self,
        settings: SpareSettings,
        nodes: Callable[[], Collection[str]],
        start: Callable[[str], SpareT],
        say: Callable[[str], None],
    ) -> None:
        """`nodes()`: the nodes of ranks now. `start(node_id)` begins to start a spare there; raises OctavoError when
        there will be no other. `say` shows a line."""
        self._settings, self._nodes, self._start, self._say = settings, nodes, start, say
        self._lock = threading.Lock()  # of the next
        self._spares: list[_Kept[SpareT]] = []
        self._known: dict[str, _Node] = {}
        self._lacks_since: float | None = None
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="spare ranks", daemon=True)

    def start(self) -> None:
        """Begins to keep them."""
        self._thread.start()

    @property
    def is_running(self) -> bool:
        """Whether others still start."""
        return self._thread.is_alive()

    def take(self, node_id: str) -> SpareT | None:
        """One that is ready there, and is the caller's from now on."""
        for kept in self._on(node_id):
            if kept.spare.condition() is SpareCondition.READY and self._forget(kept):
                return kept.spare
        return None

    def stop(self) -> None:
        """Starts no more."""
        self._is_over.set()
        if self._thread.is_alive():
            self._thread.join(_STOP_TIMEOUT_S)

    def end_all(self) -> None:
        """After `stop`: ends those that nobody took."""
        with self._lock:
            spares, self._spares = self._spares, []
        for kept in spares:
            kept.spare.end()

    def _run(self) -> None:
        while not self._is_over.is_set():
            try:
                self.look(time.monotonic())
            except OctavoError:  # the server is ending
                return
            self._is_over.wait(_LOOK_S)

    def look(self, now: float) -> None:
        """Starts what lacks and may start, and ends what is on a node without ranks."""
        nodes = set(self._nodes())
        self._drop_dead(now)
        for kept in self._on():
            if kept.node_id not in nodes and self._forget(kept):
                kept.spare.end()
        lacking = [node for node in sorted(nodes) if self._lacks(node, now)]
        if not lacking:
            self._lacks_since = None
        elif self._may_start(now):
            for node in lacking:
                self._start_on(node)

    def _drop_dead(self, now: float) -> None:
        for kept in self._on():
            condition = kept.spare.condition()
            if condition is SpareCondition.READY and not kept.was_ready:
                kept.was_ready = True
                self._node(kept.node_id).policy.serves(now)
            elif condition is SpareCondition.DEAD and self._forget(kept):
                self._note_death(kept.node_id, now)

    def _note_death(self, node_id: str, now: float) -> None:
        node = self._node(node_id)
        delay_s = node.policy.delay_s(now)
        if delay_s is not None:
            node.not_before = now + delay_s
            return
        node.is_given_up = True
        times = node.policy.num_failures
        self._say(f"spare ranks of node {node_id[:8]} died {times} time(s) within 10 minutes: no more are kept there")

    def _lacks(self, node_id: str, now: float) -> bool:
        node = self._node(node_id)
        has_all = len(self._on(node_id)) >= self._settings.num_on_node
        return not (has_all or node.is_given_up or now < node.not_before)

    def _may_start(self, now: float) -> bool:
        if self._lacks_since is None:
            self._lacks_since = now
        return now - self._lacks_since >= _MAX_WAIT_S or self._settings.is_calm()

    def _start_on(self, node_id: str) -> None:
        while len(self._on(node_id)) < self._settings.num_on_node and not self._is_over.is_set():
            spare = self._start(node_id)
            with self._lock:
                self._spares.append(_Kept(node_id, spare))

    def _node(self, node_id: str) -> _Node:
        return self._known.setdefault(node_id, _Node(self._settings.new_policy()))

    def _on(self, node_id: str | None = None) -> list[_Kept[SpareT]]:
        """The spares of one node, or all."""
        with self._lock:
            return [kept for kept in self._spares if node_id in (None, kept.node_id)]

    def _forget(self, kept: _Kept[SpareT]) -> bool:
        """Whether it still was here: it is the caller's then."""
        with self._lock:
            if kept in self._spares:
                self._spares.remove(kept)
                return True
            return False
