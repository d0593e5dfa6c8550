"""What `GetStatus` says of the scheduler and its groups."""

import time

from ...proto import admin_pb2, engine_pb2
from ..core.membership import GroupMember
from ..core.scheduler import Scheduler
from ..core.scheduler_counters import SchedulerCounters
from ..core.worker_group import WorkerGroup
from .group_runner import GroupRunner


def engine_counters(counters: SchedulerCounters, num_refused: int) -> admin_pb2.EngineCounters:
    return admin_pb2.EngineCounters(
        num_requests=counters.num_requests,
        num_finished=counters.num_finished,
        num_cancelled=counters.num_cancelled,
        num_failed=counters.num_failed + num_refused,
        num_preemptions=counters.num_preemptions,
        num_prompt_tokens=counters.num_prompt_tokens,
        num_output_tokens=counters.num_output_tokens,
    )


def failure_of(member: GroupMember, runner: GroupRunner) -> engine_pb2.GroupFailure:
    """Of a group that failed: while it served, or while it was rebuilt."""
    failure = engine_pb2.GroupFailure(
        group_id=member.group_id, epoch=member.epoch, reason=member.failure, is_explained=member.is_explained
    )
    if runner.downfall is not None:
        failure.age_s = time.monotonic() - runner.downfall.at
        failure.silent_s = runner.downfall.silent_s
    return failure


def group_status(
    member: GroupMember, runner: GroupRunner, scheduler: Scheduler, config: engine_pb2.EngineConfig
) -> admin_pb2.GroupStatus:
    """Of a group in any state; what it holds only while the scheduler has it."""
    status = admin_pb2.GroupStatus(
        group_id=member.group_id,
        state=admin_pb2.GroupState.Name(member.state.value),
        epoch=member.epoch,
        ranks=[
            admin_pb2.RankStatus(rank=rank, address=endpoint.address, device=endpoint.device)
            for rank, endpoint in enumerate(runner.link.endpoints)
        ],
        block_size=config.block_size,
        steps=runner.steps,
        failure=member.failure,
        num_restarts=member.num_restarts,
    )
    if group := scheduler.groups.get(member.group_id):
        status.num_blocks = group.blocks.num_blocks
        status.num_free_blocks = group.blocks.num_free_blocks
        status.num_running = len(group.running)
        status.num_inflight_steps = len(group.inflight)
        status.blocks.CopyFrom(_block_status(group))
        status.block_counters.CopyFrom(_block_counters(group))
    return status


def _block_status(group: WorkerGroup) -> admin_pb2.BlockStatus:
    blocks = group.blocks
    return admin_pb2.BlockStatus(
        num_used=group.num_used_blocks,
        num_shared=blocks.pool.num_shared,
        num_table_entries=blocks.num_table_entries,
        num_cached=blocks.num_cached_blocks,
        num_empty_places=group.num_empty_places,
        num_host=blocks.host.num_blocks if blocks.host else 0,
        num_host_used=blocks.host.num_used if blocks.host else 0,
        num_in_transfer=blocks.transfers.num_blocks,
    )


def _block_counters(group: WorkerGroup) -> admin_pb2.BlockCounters:
    counters, totals = group.blocks.counters, group.totals
    return admin_pb2.BlockCounters(
        num_looked_up_tokens=counters.num_looked_up_tokens,
        num_device_hit_tokens=counters.num_device_hit_tokens,
        num_host_hit_tokens=counters.num_host_hit_tokens,
        num_copied_blocks=counters.num_copied_blocks,
        num_saved_blocks=counters.num_saved_blocks,
        num_loaded_blocks=counters.num_loaded_blocks,
        num_evicted_blocks=counters.num_evicted_blocks,
        num_steps=totals.num_steps,
        sum_used=totals.sum_used,
        sum_table_entries=totals.sum_table_entries,
        sum_empty_places=totals.sum_empty_places,
        num_received_blocks=counters.num_received_blocks,
    )
