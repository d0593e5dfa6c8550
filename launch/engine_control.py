"""The launcher's line to the coordinator: worker groups in, status out."""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import grpc

from ..errors import FailedPreconditionError, NotFoundError, OctavoError, UnavailableError
from ..internal_channel import ANSWERED
from ..proto import admin_pb2, engine_pb2, engine_pb2_grpc

_START_TIMEOUT_S = 60.0
_PROBE_S = 0.2
# A coordinator that is alive and busy answers within a step; after this long it hangs.
_STATUS_TIMEOUT_S = 30.0


class CoordinatorLostError(UnavailableError):
    """A call ended without an answer: the coordinator died or ends, hangs, or is not there yet. Another may follow."""


@dataclass(frozen=True, slots=True, order=True)
class GroupBlocks:
    """KV blocks of a group: on its devices, and in its hosts' memory."""

    num_blocks: int
    num_host_blocks: int


class EngineControl:
    """A channel to the coordinator at `address`. Any thread calls it."""

    def __init__(self, address: str) -> None:
        self._address = address
        self.renew()

    def renew(self) -> None:
        """Another coordinator will be at the address. Calls to the one before end by themselves, as it did; on its
        channel the next ones could still find it."""
        options = [
            ("grpc.initial_reconnect_backoff_ms", 50),
            ("grpc.max_reconnect_backoff_ms", 100),
            ("grpc.use_local_subchannel_pool", 1),
        ]
        self._channel = grpc.insecure_channel(self._address, options=options)
        self._stub = engine_pb2_grpc.EngineStub(self._channel)

    def wait_until_up(self, require_alive: Callable[[], None]) -> None:
        """Until the coordinator answers. Raises what `require_alive` raises, or UnavailableError after a minute."""
        deadline = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline:
            require_alive()
            try:
                grpc.channel_ready_future(self._channel).result(timeout=_PROBE_S)
                return
            except grpc.FutureTimeoutError:
                continue
        raise UnavailableError(f"the coordinator did not answer within {_START_TIMEOUT_S:.0f} s")

    def add_group(self, request: engine_pb2.AddGroupRequest, report: Callable[[str, float], None]) -> GroupBlocks:
        """Has the group load the model; `report(stage, duration_s)` after each stage.

        Raises UnavailableError with the first rank's reason; CoordinatorLostError if the coordinator does not answer.
        """
        blocks = GroupBlocks(0, 0)
        try:
            for progress in self._stub.AddGroup(request):
                if progress.num_blocks:
                    blocks = GroupBlocks(progress.num_blocks, progress.num_host_blocks)
                else:
                    report(progress.stage, progress.duration_s)
        except grpc.RpcError as error:
            raise _to_error(error, f"worker group {request.group_id} did not start") from error
        return blocks

    def await_failures(self, known_epochs: Collection[int], timeout_s: float) -> Sequence[engine_pb2.GroupFailure]:
        """Groups that failed and that nobody rebuilds, but for those known; none if there are none within `timeout_s`.

        Raises UnavailableError if the coordinator does not answer.
        """
        request = engine_pb2.AwaitFailureRequest(known_epochs=known_epochs)
        try:
            failures: Sequence[engine_pb2.GroupFailure] = self._stub.AwaitFailure(request, timeout=timeout_s).failures
            return failures
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                return []
            raise _to_error(error, "the coordinator does not answer") from error

    def abandon_group(self, group_id: int) -> None:
        """A group that failed will not be rebuilt. Raises UnavailableError if the coordinator does not answer."""
        try:
            self._stub.AbandonGroup(engine_pb2.AbandonGroupRequest(group_id=group_id), timeout=_STATUS_TIMEOUT_S)
        except grpc.RpcError as error:
            raise _to_error(error, f"worker group {group_id} could not be given up") from error

    def remove_group(self, group_id: int, report: Callable[[int], None]) -> None:
        """Until what the group runs has gone on elsewhere and nothing of it is left; `report(num_running)` meanwhile.

        Raises NotFoundError for one that the coordinator does not know; FailedPreconditionError for one that does not
        serve or is the last; CoordinatorLostError if the coordinator does not answer.
        """
        try:
            for progress in self._stub.RemoveGroup(engine_pb2.RemoveGroupRequest(group_id=group_id)):
                report(progress.num_running)
        except grpc.RpcError as error:
            refusals = {
                grpc.StatusCode.FAILED_PRECONDITION: FailedPreconditionError,
                grpc.StatusCode.NOT_FOUND: NotFoundError,
            }
            if refusal := refusals.get(error.code()):
                raise refusal(str(error.details())) from error
            raise _to_error(error, f"worker group {group_id} could not be removed") from error

    def status(self) -> admin_pb2.GetStatusResponse:
        """Raises CoordinatorLostError if the coordinator does not answer."""
        try:
            status: admin_pb2.GetStatusResponse = self._stub.GetStatus(
                admin_pb2.GetStatusRequest(), timeout=_STATUS_TIMEOUT_S
            )
            return status
        except grpc.RpcError as error:
            raise _to_error(error, "the coordinator does not answer") from error

    def is_calm(self) -> bool:
        """Whether every group serves, and none starts or is rebuilt."""
        try:
            groups = self.status().groups
        except UnavailableError:
            return False
        return all(group.state in (admin_pb2.GROUP_STATE_READY, admin_pb2.GROUP_STATE_DRAINING) for group in groups)

    def begin_status(self, timeout_s: float) -> "grpc.Future":
        """Asks for the status, and waits for no answer; without one the call ends with DEADLINE_EXCEEDED."""
        return self._stub.GetStatus.future(admin_pb2.GetStatusRequest(), timeout=timeout_s)

    def close(self) -> None:
        """Ends calls that still run."""
        self._channel.close()


def _to_error(error: grpc.RpcError, what: str) -> OctavoError:
    kind = UnavailableError if ANSWERED in (error.trailing_metadata() or ()) else CoordinatorLostError
    return kind(f"{what}: {' '.join(str(error.details()).split())}")
