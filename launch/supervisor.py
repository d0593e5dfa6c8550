"""Starts the processes of one server in order, watches them, and ends them: gateways, coordinator, Ray's actors.

Once the server is ready, what dies comes back (launch/keeper.py) where that is wanted; otherwise any process that dies
ends the server with one clear line. Nothing is left behind: processes, sockets, files.
"""

import contextlib
import threading
import time
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING

from google.protobuf.message import Message

from ..errors import UnavailableError
from ..proto import admin_pb2
from .child_process import ChildProcess
from .config import ServeConfig
from .engine_control import EngineControl
from .gateway_health import begin_gateway_check, gateway_serves
from .groups import GroupSettings, WorkerGroups
from .keeper import Keeper
from .kept_process import Heartbeat, KeptProcess
from .process_configs import GatewayAddresses, engine_config, gateway_config
from .rank_spares import SpareSettings
from .recovery import Recovery
from .resolve import (
    Placement,
    ServedModel,
    check_ports,
    check_ray_address,
    num_spare_ranks,
    resolve_model,
    resolve_placement,
)
from .restart_policy import RestartPolicy
from .run_dir import RunDir
from .scaling import Scaling
from .start_display import StartDisplay

if TYPE_CHECKING:
    from .ray_cluster import RayCluster

_GATEWAY_START_TIMEOUT_S = 60.0
_GATEWAY_STOP_TIMEOUT_S = 5.0  # beyond what running requests have
_LAST_WORDS_S = 3.0  # of a gateway that is to be quick
_COORDINATOR_STOP_TIMEOUT_S = 5.0
_DEATH_S = 1.0  # from the end of a process's connections to that of the process
_POLL_S = 0.05
_WATCH_S = 0.5


class Supervisor:
    """Owner of a server's processes. `start`, then `watch` or nothing, then `stop`, which is safe at any point."""

    def __init__(self, config: ServeConfig, display: StartDisplay, rebuilds_groups: bool = False) -> None:
        """`rebuilds_groups`: whether `watch` will run, what dies come back, so far as the options allow, and groups
        come and go."""
        self._config = config
        self._is_served = rebuilds_groups
        self._rebuilds_groups = rebuilds_groups and config.max_restarts > 0
        self._display = display
        self._run_dir: RunDir | None = None
        self._gateways: list[ChildProcess] = []
        self._coordinator: ChildProcess | None = None
        self._cluster: RayCluster | None = None
        self._control: EngineControl | None = None
        self._groups: WorkerGroups | None = None
        self._keeper: Keeper | None = None
        self._scaling: Scaling | None = None
        self._num_coordinators = 0
        self._is_ready = False

    @property
    def local_addresses(self) -> list[str]:
        """Each gateway's own gRPC door."""
        return [self._files.socket(f"gateway-{index}") for index in range(self._config.num_gateways)]

    # Start

    def start(self) -> ServedModel:
        """Until the server is ready. Raises OctavoError, in one line, if it cannot be; then call `stop`."""
        with self._display.step("model", f"Checking {self._config.model}") as step:
            model = resolve_model(self._config)
            step.detail = model.description
        check_ports(self._config)
        check_ray_address(self._config.ray_address)
        self._run_dir = RunDir()
        self._start_gateways(model)  # they load the tokenizer while Ray starts
        placement = self._start_ray(model)
        self._coordinator = self._start_coordinator(model, placement)
        groups = self._start_ranks(GroupSettings(self._config, model, placement))
        self._load_model(placement, groups)
        with self._display.step("gateways", "Waiting for the gateways") as step:
            self._await_gateways()
            step.detail = f"{len(self._gateways)} ready"
        self._is_ready = True
        recovery = self._make_recovery(groups) if self._rebuilds_groups else None
        if recovery is not None:
            self._keeper = self._make_keeper(model, placement, recovery)
            self._keeper.start()
            self._keep_spares(placement)
        if self._is_served:
            self._scaling = self._begin_scaling(groups, recovery)
        return model

    def _start_gateways(self, model: ServedModel) -> None:
        for index in range(self._config.num_gateways):
            self._gateways.append(self._start_gateway(model, index))

    def _start_gateway(self, model: ServedModel, index: int) -> ChildProcess:
        launcher = self._files.socket("launcher") if self._is_served else ""
        addresses = GatewayAddresses(self.local_addresses[index], self._files.socket("engine"), launcher)
        config = gateway_config(self._config, model, addresses, self._rebuilds_groups)
        return self._spawn(f"gateway {index}", "octavo.gateway", config)

    def _start_ray(self, model: ServedModel) -> Placement:
        where = f"joining {self._config.ray_address}" if self._config.ray_address else "starting a local one"
        with self._display.step("ray", f"Ray: {where}") as step:
            from .ray_cluster import RayCluster  # half a second, and not needed before

            num_ranks = self._config.num_groups * self._config.tensor_parallel_size
            most = (self._config.max_num_groups or self._config.num_groups) * self._config.tensor_parallel_size
            temp_dir = self._files.path / "ray"
            self._cluster = RayCluster(self._config.ray_address, most, self._config.device, temp_dir)
            placement = resolve_placement(self._config, model.config, self._cluster.num_free_gpus)
            step.detail = (
                f"{'local' if self._cluster.is_local else 'joined'}, {num_ranks} rank(s) on {placement.device}"
            )
        return placement

    def _start_coordinator(self, model: ServedModel, placement: Placement) -> ChildProcess:
        """The first, or one that follows another: then nothing of that one lives."""
        config = engine_config(self._config, model, placement, self._files.socket("engine"), self._rebuilds_groups)
        config.incarnation = self._num_coordinators
        self._num_coordinators += 1
        if self._control is not None:
            self._control.renew()
        return self._spawn("coordinator", "octavo.coordinator", config)

    def _start_ranks(self, settings: GroupSettings) -> WorkerGroups:
        assert self._cluster is not None
        assert self._coordinator is not None
        with self._display.step("ranks", "Starting the ranks and the coordinator") as step:
            config = self._config
            self._control = EngineControl(self._files.socket("engine"))
            groups = self._groups = WorkerGroups(self._cluster, self._control, settings)
            groups.start_ranks(config.num_groups, config.tensor_parallel_size)
            self._control.wait_until_up(self._require_children)
            step.detail = f"{config.num_groups} group(s) of {config.tensor_parallel_size}"
        return groups

    def _load_model(self, placement: Placement, groups: WorkerGroups) -> None:
        with self._display.step("groups", "Loading the model") as step:
            blocks = min(groups.add_all(self._report_stage, self._require_children))
            num_tokens = blocks.num_blocks * self._config.block_size
            on_host = f", {blocks.num_host_blocks} more in host memory" if blocks.num_host_blocks else ""
            step.detail = f"{placement.dtype}, {blocks.num_blocks} KV blocks ({num_tokens} tokens) a group{on_host}"

    def _report_stage(self, group_id: int, stage: str, duration_s: float) -> None:
        self._display.report(f"  group {group_id}", stage, duration_s)

    def _await_gateways(self) -> None:
        deadline = time.monotonic() + _GATEWAY_START_TIMEOUT_S
        for address in self.local_addresses:
            while not gateway_serves(address, wait_for_ready=True):
                self._require_children()
                if time.monotonic() > deadline:
                    raise UnavailableError(f"the gateways were not ready within {_GATEWAY_START_TIMEOUT_S:.0f} s")
                time.sleep(_POLL_S)

    # Run

    def _make_recovery(self, groups: WorkerGroups) -> Recovery:
        assert self._cluster is not None
        assert self._control is not None
        recovery = Recovery(self._cluster, self._control, groups.request, self._display.show, self._config.max_restarts)
        for group_id in groups.sizes:
            recovery.add(group_id)
        return recovery

    def _make_keeper(self, model: ServedModel, placement: Placement, recovery: Recovery) -> Keeper:
        assert self._cluster is not None
        assert self._control is not None
        assert self._coordinator is not None
        say = self._display.show
        coordinator = KeptProcess(
            self._coordinator,
            partial(self._start_coordinator, model, placement),
            lambda: recovery.is_restored,
            Heartbeat(self._control.begin_status),
            self._new_policy(),
            say,
        )
        gateways = [self._keep_gateway(model, index) for index in range(self._config.num_gateways)]
        return Keeper(coordinator, gateways, recovery, self._control, self._cluster.require_alive, say)

    def _keep_gateway(self, model: ServedModel, index: int) -> KeptProcess:
        start = partial(self._start_gateway, model, index)
        address = self.local_addresses[index]
        heartbeat = Heartbeat(partial(begin_gateway_check, address))
        policy, say = self._new_policy(), self._display.show
        return KeptProcess(self._gateways[index], start, partial(gateway_serves, address), heartbeat, policy, say)

    def _keep_spares(self, placement: Placement) -> None:
        assert self._cluster is not None
        assert self._control is not None
        if num_spare := num_spare_ranks(self._config, placement.device):
            settings = SpareSettings(num_spare, self._control.is_calm, self._new_policy)
            self._cluster.keep_spares(settings, placement.device, self._display.show)

    def _new_policy(self) -> RestartPolicy:
        return RestartPolicy(self._config.max_restarts)

    def _begin_scaling(self, groups: WorkerGroups, recovery: Recovery | None) -> Scaling:
        assert self._control is not None
        return Scaling(
            self._files.socket("launcher"), self._config, groups, self._control, recovery, self._display.show
        )

    def watch(self) -> None:
        """Returns never: raises UnavailableError when a process of the server fails that does not come back."""
        while self._keeper is None:
            time.sleep(_WATCH_S)
            self.check()
        self._keeper.watch()

    def check(self) -> None:
        """Raises UnavailableError, naming the cause, if a process or a rank has failed."""
        assert self._control is not None
        assert self._groups is not None
        self._require_children()
        try:
            groups = self._control.status().groups
        except UnavailableError:
            self._await_dead_child()
            raise
        for group in groups:
            if group.state == admin_pb2.GROUP_STATE_FAILED:
                raise self._groups.named(UnavailableError(f"worker group {group.group_id} failed: {group.failure}"))

    def _await_dead_child(self) -> None:
        """Raises as `check`, if the coordinator does not answer because it died: its line breaks just before."""
        deadline = time.monotonic() + _DEATH_S
        while time.monotonic() < deadline:
            self._require_children()
            time.sleep(_POLL_S)

    def _require_children(self) -> None:
        if self._cluster is not None:
            self._cluster.require_alive()
        self._let_drained_gateways_go()
        for child in self._children():
            try:
                child.require_alive()
            except UnavailableError:
                self._show_hidden_log(child)
                raise

    def _let_drained_gateways_go(self) -> None:
        """One that was sent SIGTERM by itself is not missed while there are others."""
        for gateway in [gateway for gateway in self._gateways if self._is_ready and gateway.was_drained]:
            gateway.wait(0, threading.Event())
            self._gateways.remove(gateway)
            self._display.show(f"{gateway.name} was drained, and has ended; {len(self._gateways)} go on")
            if not self._gateways:
                raise UnavailableError("the last gateway was drained; start the server again")

    def _children(self) -> Iterable[ChildProcess]:
        """Those that are missed when they end: none, while somebody has them come back."""
        if self._keeper is not None:
            return []
        return [*self._gateways, *([self._coordinator] if self._coordinator is not None else [])]

    # Stop

    def stop(self, hurry: threading.Event) -> None:
        """Ends everything, gateways first, so that what runs may finish. `hurry` cuts every wait short."""
        self._is_ready = False
        with contextlib.ExitStack() as last_to_first:  # goes on to the end even if a step fails
            last_to_first.callback(self._remove_run_dir)
            last_to_first.callback(self._stop_cluster, hurry)
            last_to_first.callback(self._stop_coordinator, hurry)
            last_to_first.callback(self._stop_keeper)
            last_to_first.callback(self._stop_scaling)
            self._stop_gateways(hurry)

    def _stop_keeper(self) -> None:
        """Only now: what still ran needed coordinator and groups."""
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            self._coordinator = keeper.stop()

    def _stop_gateways(self, hurry: threading.Event) -> None:
        if self._keeper is not None:
            self._gateways = self._keeper.drain()
        for gateway in self._gateways:
            gateway.terminate()
        deadline = time.monotonic() + self._config.shutdown_timeout + _GATEWAY_STOP_TIMEOUT_S
        while not all(gateway.has_ended for gateway in self._gateways):
            if hurry.wait(_POLL_S) or time.monotonic() > deadline or self._has_lost_engine():
                break
        for gateway in self._gateways:
            gateway.terminate()  # the second time: it gives up what runs, and says so
        for gateway in self._gateways:
            gateway.wait(_LAST_WORDS_S, threading.Event())
        self._gateways.clear()

    def _has_lost_engine(self) -> bool:
        """Whether no request could go on."""
        return self._keeper is not None and self._keeper.has_lost_engine

    def _stop_scaling(self) -> None:
        """After the gateways: what they still run may need a change that is under way."""
        scaling, self._scaling = self._scaling, None
        if scaling is not None:
            scaling.stop()

    def _stop_coordinator(self, hurry: threading.Event) -> None:
        if self._cluster is not None:
            self._cluster.stop_spares()  # asks the coordinator whether it may start one
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._coordinator is not None:
            self._coordinator.terminate()
            self._coordinator.wait(_COORDINATOR_STOP_TIMEOUT_S, hurry)
            self._coordinator = None

    def _stop_cluster(self, hurry: threading.Event) -> None:
        cluster, self._cluster = self._cluster, None
        if cluster is not None:
            cluster.shut_down(hurry)

    def _remove_run_dir(self) -> None:
        run_dir, self._run_dir = self._run_dir, None
        if run_dir is not None:
            run_dir.remove()

    # Processes and files

    @property
    def _files(self) -> RunDir:
        assert self._run_dir is not None
        return self._run_dir

    def _spawn(self, name: str, module: str, config: Message) -> ChildProcess:
        return ChildProcess(name, module, self._files.write(name, config), self._take_log)

    def _take_log(self, name: str, line: str) -> None:
        """During the start the log is kept back: if the start fails, one line says why."""
        if self._is_ready:
            self._display.log(name, line)

    def _show_hidden_log(self, child: ChildProcess) -> None:
        """A process that dies of a known cause says so in one line, which the error repeats; a traceback has more."""
        if not self._is_ready and len(child.log) > 1:
            for line in child.log:
                self._display.log(child.name, line)
