"""`octavo status` as tables."""

from collections.abc import Iterable, Sequence

from rich.console import Console, Group
from rich.table import Table

from ..gateway.block_report import GROUP_STATES, BlockReport, block_report
from ..proto import admin_pb2

_GROUPS_BESIDE = 4


def print_status(status: admin_pb2.GetStatusResponse, console: Console) -> None:
    console.print(Group(*_parts(status)))


def print_blocks(status: admin_pb2.GetStatusResponse, console: Console) -> None:
    """What the KV blocks of each group hold: a column a group, a few groups beside each other."""
    reports = [block_report(group) for group in status.groups]
    if not reports:
        console.print("no worker groups yet")
    starts = range(0, len(reports), _GROUPS_BESIDE)
    console.print(Group(*[_blocks(reports[start : start + _GROUPS_BESIDE]) for start in starts]))


def _blocks(reports: Sequence[BlockReport]) -> Table:
    table = _table("KV blocks", "", *[f"group {report.group_id}" for report in reports])
    columns = [_block_rows(report) for report in reports]
    for name in columns[0]:
        table.add_row(name, *[column[name] for column in columns])
    return table


def _block_rows(report: BlockReport) -> dict[str, str]:
    return {
        "blocks": f"{report.num_blocks} x {report.block_size}",
        "used": _of(report.num_used, report.num_blocks),
        "  shared": str(report.num_shared),
        "free": _of(report.num_free, report.num_blocks),
        "  cached": _of(report.num_cached, report.num_blocks),
        "in transfer": str(report.num_in_transfer),
        "on the host": f"{report.num_host_used} of {report.num_host_blocks}" if report.num_host_blocks else "none",
        "entries of block tables": str(report.num_table_entries),
        "  empty places": str(report.num_empty_places),
        "  fragmentation": f"{report.fragmentation:.1%}",
        "  saved by sharing": f"{report.saved_by_sharing:.1%}",
        "since the start": "",
        "  fragmentation, mean": f"{report.mean_fragmentation:.1%}",
        "  saved by sharing, mean": f"{report.mean_saved_by_sharing:.1%}",
        "  prompt tokens looked up": str(report.num_looked_up_tokens),
        "  found on the device": f"{report.device_hit_rate:.1%}",
        "  found on the host": f"{report.host_hit_rate:.1%}",
        "  blocks copied on write": str(report.num_copied_blocks),
        "  saved to the host": str(report.num_saved_blocks),
        "  loaded from the host": str(report.num_loaded_blocks),
        "  cached, then evicted": str(report.num_evicted_blocks),
        "  received from other groups": str(report.num_received_blocks),
    }


def _of(part: int, whole: int) -> str:
    return f"{part} ({part / whole:.0%})" if whole else str(part)


def _parts(status: admin_pb2.GetStatusResponse) -> Iterable[str | Table]:
    server = f"{status.model}, Octavo {status.version}, up {status.uptime_s:.0f} s"
    yield f"{server}, {status.num_gateways} gateway(s), {status.num_waiting} waiting"
    yield _groups(status)
    yield _ranks(status)
    yield _counters(status.counters)


def _groups(status: admin_pb2.GetStatusResponse) -> Table:
    table = _table("groups", "group", "state", "running", "blocks used", "blocks", "steps", "ms a step", "tokens")
    table.columns[1].min_width = max(map(len, GROUP_STATES.values()))  # a narrow terminal may cut others short
    for group in status.groups:
        used = group.num_blocks - group.num_free_blocks
        step_ms = 1000 * group.steps.step_time_s / group.steps.num_steps if group.steps.num_steps else 0.0
        table.add_row(
            str(group.group_id),
            GROUP_STATES.get(group.state, "unknown"),
            str(group.num_running),
            _of(used, group.num_blocks),
            f"{group.num_blocks} x {group.block_size}",
            str(group.steps.num_steps),
            f"{step_ms:.2f}",
            str(group.steps.num_tokens),
        )
    return table


def _ranks(status: admin_pb2.GetStatusResponse) -> Table:
    table = _table("ranks", "group", "epoch", "restarts", "rank", "device", "address")
    for group in status.groups:
        of_group = (str(group.group_id), str(group.epoch), str(group.num_restarts))
        for rank in group.ranks:
            table.add_row(*of_group, str(rank.rank), rank.device, rank.address)
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
