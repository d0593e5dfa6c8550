"""`octavo status` as tables."""

from collections.abc import Iterable

from rich.console import Console, Group
from rich.table import Table

from ..proto import admin_pb2

_STATES = {
    admin_pb2.GROUP_STATE_STARTING: "starting",
    admin_pb2.GROUP_STATE_READY: "ready",
    admin_pb2.GROUP_STATE_FAILED: "failed",
}


def print_status(status: admin_pb2.GetStatusResponse, console: Console) -> None:
    console.print(Group(*_parts(status)))


def _parts(status: admin_pb2.GetStatusResponse) -> Iterable[str | Table]:
    server = f"{status.model}, Octavo {status.version}, up {status.uptime_s:.0f} s"
    yield f"{server}, {status.num_gateways} gateway(s), {status.num_waiting} waiting"
    yield _groups(status)
    yield _ranks(status)
    yield _counters(status.counters)


def _groups(status: admin_pb2.GetStatusResponse) -> Table:
    table = _table("groups", "group", "state", "running", "blocks used", "blocks", "steps", "ms a step", "tokens")
    for group in status.groups:
        used = group.num_blocks - group.num_free_blocks
        step_ms = 1000 * group.steps.step_time_s / group.steps.num_steps if group.steps.num_steps else 0.0
        table.add_row(
            str(group.group_id),
            _STATES.get(group.state, "unknown"),
            str(group.num_running),
            f"{used} ({used / group.num_blocks:.0%})" if group.num_blocks else "0",
            f"{group.num_blocks} x {group.block_size}",
            str(group.steps.num_steps),
            f"{step_ms:.2f}",
            str(group.steps.num_tokens),
        )
    return table


def _ranks(status: admin_pb2.GetStatusResponse) -> Table:
    table = _table("ranks", "group", "rank", "device", "address")
    for group in status.groups:
        for rank in group.ranks:
            table.add_row(str(group.group_id), str(rank.rank), rank.device, rank.address)
    return table


def _counters(counters: admin_pb2.EngineCounters) -> Table:
    table = _table("since the start", "requests", "finished", "cancelled", "failed", "preemptions", "tokens in", "out")
    table.add_row(
        str(counters.num_requests),
        str(counters.num_finished),
        str(counters.num_cancelled),
        str(counters.num_failed),
        str(counters.num_preemptions),
        str(counters.num_prompt_tokens),
        str(counters.num_output_tokens),
    )
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column)
    return table
