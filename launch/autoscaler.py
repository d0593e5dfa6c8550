"""Has the number of worker groups follow the load: looks at it each second, and asks the Scaler as anybody would."""

import threading
import time
from collections.abc import Callable

from ..errors import OctavoError
from ..proto import admin_pb2
from .autoscale_policy import AutoscalePolicy, Load
from .engine_control import CoordinatorLostError
from .scaler import Scaler

_LOOK_S = 1.0


class Autoscaler:
    """Owner of a thread, from its making to `stop`."""

    def __init__(
        self,
        scaler: Scaler,
        policy: AutoscalePolicy,
        status: Callable[[], admin_pb2.GetStatusResponse],
        max_num_seqs: int,
        show: Callable[[str], None],
    ) -> None:
        """`max_num_seqs` of each group."""
        self._scaler, self._policy, self._status, self._show = scaler, policy, status, show
        self._max_num_seqs = max_num_seqs
        self._stopping = threading.Event()
        threading.Thread(target=self._run, name="autoscaler", daemon=True).start()

    def stop(self) -> None:
        """Looks no more."""
        self._stopping.set()

    def _run(self) -> None:
        while not self._stopping.wait(_LOOK_S):
            try:
                self._look()
            except CoordinatorLostError:  # when another is there, the load is judged anew
                self._policy.note_change()
            except OctavoError as error:
                self._policy.note_failure(time.monotonic())
                if not self._stopping.is_set():
                    self._show(f"autoscaling: {error}")

    def _look(self) -> None:
        load = load_of(self._status(), self._max_num_seqs)
        num_groups = self._policy.decide(load, time.monotonic())
        if num_groups is None or not self._scaler.is_settled:
            return
        self._show(f"autoscaling to {num_groups} group(s): {load.num_waiting} wait, {load.num_running} run")
        for _ in self._scaler.scale(num_groups):
            pass
        self._policy.note_change()


def load_of(status: admin_pb2.GetStatusResponse, max_num_seqs: int) -> Load:
    """Of the groups that serve."""
    serving = [group for group in status.groups if group.state == admin_pb2.GROUP_STATE_READY]
    return Load(
        num_groups=len(serving),
        num_waiting=status.num_waiting,
        num_running=sum(group.num_running for group in serving),
        max_num_seqs=max_num_seqs,
        num_used_blocks=sum(group.num_blocks - group.num_free_blocks for group in serving),
        num_blocks=sum(group.num_blocks for group in serving),
    )
