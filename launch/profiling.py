"""`octavo profile`: asks rank 0 of each group to profile its next steps, and shows what the device did in them."""

import statistics
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc
from rich.console import Console
from rich.table import Table

from ..errors import FailedPreconditionError, InvalidArgumentError, NotFoundError, UnavailableError
from ..proto import admin_pb2, worker_pb2, worker_pb2_grpc

_MAX_NUM_STEPS = 1000  # as workers hold to

# Columns of a terminal: kernels have long names, and their numbers matter more.
_NUMBERS_WIDTH = 44
_MIN_NAME_WIDTH = 16


@dataclass(frozen=True, slots=True)
class ProfileOptions:
    """Construction checks. `group` is a group id; None means all. `out` is a directory on the worker's machine."""

    num_steps: int
    out: Path
    timeout_s: float
    group: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.num_steps <= _MAX_NUM_STEPS:
            raise InvalidArgumentError(f"num_steps must be in [1, {_MAX_NUM_STEPS}], got {self.num_steps}", "num_steps")
        if not 0 < self.timeout_s < float("inf"):
            raise InvalidArgumentError(f"timeout must be over 0, got {self.timeout_s}", "timeout")


@dataclass(frozen=True, slots=True)
class GroupProfile:
    """What rank 0 of one group saw, and where on its machine the trace lies."""

    group_id: int
    trace_path: Path
    steps: worker_pb2.ProfileResponse


def profile_groups(status: admin_pb2.GetStatusResponse, options: ProfileOptions) -> list[GroupProfile]:
    """All groups at once. Raises OctavoError, in one line, if one cannot be profiled or nothing runs in time."""
    groups = [group for group in status.groups if options.group in (None, group.group_id)]
    if not groups:
        known = ", ".join(str(group.group_id) for group in status.groups) or "none"
        raise NotFoundError(f"there is no group {options.group}; the server's groups: {known}")
    for group in groups:
        _require_gpu(group)
    with ThreadPoolExecutor(len(groups), "profile") as pool:
        return list(pool.map(lambda group: _profile(group, options), groups))


def _require_gpu(group: admin_pb2.GroupStatus) -> None:
    if group.state != admin_pb2.GROUP_STATE_READY:
        raise FailedPreconditionError(f"group {group.group_id} is not ready")
    if group.ranks[0].device == "cpu":
        raise FailedPreconditionError(f"only a GPU's steps can be profiled; group {group.group_id} runs on the CPU")


def _profile(group: admin_pb2.GroupStatus, options: ProfileOptions) -> GroupProfile:
    address = group.ranks[0].address
    path = options.out.resolve() / f"group-{group.group_id}-rank-0.json"
    request = worker_pb2.ProfileRequest(num_steps=options.num_steps, trace_path=str(path))
    with grpc.insecure_channel(address) as channel:
        try:
            steps = worker_pb2_grpc.WorkerStub(channel).Profile(request, timeout=options.timeout_s)
        except grpc.RpcError as error:
            raise _to_error(error, group.group_id, address, options) from error
    return GroupProfile(group.group_id, path, steps)


def _to_error(error: grpc.RpcError, group_id: int, address: str, options: ProfileOptions) -> Exception:
    if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
        return UnavailableError(
            f"group {group_id} did not run {options.num_steps} steps within {options.timeout_s:g} s; send it requests "
            "meanwhile, lower --num-steps, or raise --timeout"
        )
    details = " ".join(str(error.details()).split())
    if error.code() == grpc.StatusCode.FAILED_PRECONDITION:
        return FailedPreconditionError(f"group {group_id} cannot be profiled: {details}")
    return UnavailableError(f"rank 0 of group {group_id} at {address}: {details}")


def print_profiles(profiles: list[GroupProfile], console: Console) -> None:
    for profile in profiles:
        console.print(_kernels(profile, console.width))
        for line in _summary(profile):
            console.print(line, soft_wrap=True, highlight=False)


def _kernels(profile: GroupProfile, width: int) -> Table:
    title = f"group {profile.group_id}, rank 0: {profile.steps.num_steps} steps"
    table = Table(title=title, title_justify="left")
    table.add_column(
        "kernel", overflow="ellipsis", no_wrap=True, max_width=max(_MIN_NAME_WIDTH, width - _NUMBERS_WIDTH)
    )
    for name in ("calls a step", "us a step", "mean us"):
        table.add_column(name, justify="right")
    for kernel in profile.steps.kernels:
        table.add_row(kernel.name, f"{kernel.calls:.2f}", f"{kernel.time_us:.1f}", f"{kernel.mean_us:.2f}")
    return table


def _summary(profile: GroupProfile) -> Iterator[str]:
    steps = profile.steps
    share = f" ({steps.idle_us / steps.span_us:.0%})" if steps.span_us else ""
    yield f"a step: {steps.span_us:.1f} us, of which idle {steps.idle_us:.1f} us{share}"
    if steps.step_gaps_us:
        gaps = steps.step_gaps_us
        yield f"idle before a step: p50 {statistics.median(gaps):.1f} us, max {max(gaps):.1f} us"
    yield f"trace, on the worker's machine: {profile.trace_path}"
