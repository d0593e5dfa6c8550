"""What a server's launcher has for changes of scale: the Scaler, its gRPC door for gateways, perhaps the autoscaler."""

from collections.abc import Callable

from .autoscale_policy import AutoscalePolicy
from .autoscaler import Autoscaler
from .config import ServeConfig
from .engine_control import EngineControl
from .groups import WorkerGroups
from .launcher_service import LauncherService
from .recovery import Recovery
from .scale_plan import Scale, ScaleBounds
from .scaler import NoKeeper, Scaler


class Scaling:
    """Owner of the three, from its making to `stop`."""

    def __init__(
        self,
        address: str,
        config: ServeConfig,
        groups: WorkerGroups,
        control: EngineControl,
        recovery: Recovery | None,
        show: Callable[[str], None],
    ) -> None:
        """`address` of the door. `recovery` rebuilds groups that fail; None: nobody does."""
        now = Scale(config.num_groups, config.tensor_parallel_size)
        bounds = ScaleBounds()
        if config.max_num_groups is not None:
            bounds = ScaleBounds(config.min_num_groups, config.max_num_groups, is_autoscaling=True)
        self._scaler = Scaler(groups, control, recovery or NoKeeper(), now, bounds, show)
        self._service = LauncherService(address, self._scaler)
        self._autoscaler: Autoscaler | None = None
        if bounds.is_autoscaling:
            policy = AutoscalePolicy(bounds.least, bounds.most)
            self._autoscaler = Autoscaler(self._scaler, policy, control.status, config.max_num_seqs, show)

    def stop(self) -> None:
        """Nothing more begins. A change that runs breaks off when the coordinator is gone."""
        if self._autoscaler is not None:
            self._autoscaler.stop()
        self._scaler.stop()
        self._service.stop()
