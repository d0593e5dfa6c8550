"""A group's blocks as people ask for them: counts, and the shares that follow from them. Pure.

Shares are in [0, 1]; 0 where there is nothing to divide by.

- fragmentation: places for tokens, in the block tables' entries, that hold no token; the waste of the PagedAttention
  paper (W. Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention", 2023).
- saved by sharing: of the blocks that the tables would take if none were shared, those that they do not take (ibid.,
  section 6.3).
- hit rates: of the prompt tokens looked up, those found in device blocks and in host blocks.
"""

from dataclasses import asdict, dataclass
from typing import Any

from ..proto import admin_pb2

GROUP_STATES = {
    admin_pb2.GROUP_STATE_STARTING: "starting",
    admin_pb2.GROUP_STATE_READY: "ready",
    admin_pb2.GROUP_STATE_FAILED: "failed",
    admin_pb2.GROUP_STATE_REBUILDING: "rebuilding",
    admin_pb2.GROUP_STATE_DRAINING: "draining",
}


@dataclass(frozen=True, slots=True)
class BlockReport:
    """One group, now and on average over its steps."""

    group_id: int
    state: str  # "starting", "ready", "failed", "rebuilding", "draining"
    block_size: int
    num_blocks: int
    num_used: int
    num_shared: int
    num_free: int  # cached ones among them
    num_cached: int
    num_table_entries: int
    num_empty_places: int
    num_host_blocks: int
    num_host_used: int
    num_in_transfer: int
    fragmentation: float
    saved_by_sharing: float
    # Since the group started.
    mean_fragmentation: float
    mean_saved_by_sharing: float
    num_looked_up_tokens: int
    device_hit_rate: float
    host_hit_rate: float
    num_copied_blocks: int
    num_saved_blocks: int
    num_loaded_blocks: int
    num_evicted_blocks: int
    num_received_blocks: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def block_report(group: admin_pb2.GroupStatus) -> BlockReport:
    blocks, counters = group.blocks, group.block_counters
    return BlockReport(
        group_id=group.group_id,
        state=GROUP_STATES.get(group.state, "unknown"),
        block_size=group.block_size,
        num_blocks=group.num_blocks,
        num_used=blocks.num_used,
        num_shared=blocks.num_shared,
        num_free=group.num_free_blocks,
        num_cached=blocks.num_cached,
        num_table_entries=blocks.num_table_entries,
        num_empty_places=blocks.num_empty_places,
        num_host_blocks=blocks.num_host,
        num_host_used=blocks.num_host_used,
        num_in_transfer=blocks.num_in_transfer,
        fragmentation=_share(blocks.num_empty_places, blocks.num_table_entries * group.block_size),
        saved_by_sharing=_saved(blocks.num_used, blocks.num_table_entries),
        mean_fragmentation=_share(counters.sum_empty_places, counters.sum_table_entries * group.block_size),
        mean_saved_by_sharing=_saved(counters.sum_used, counters.sum_table_entries),
        num_looked_up_tokens=counters.num_looked_up_tokens,
        device_hit_rate=_share(counters.num_device_hit_tokens, counters.num_looked_up_tokens),
        host_hit_rate=_share(counters.num_host_hit_tokens, counters.num_looked_up_tokens),
        num_copied_blocks=counters.num_copied_blocks,
        num_saved_blocks=counters.num_saved_blocks,
        num_loaded_blocks=counters.num_loaded_blocks,
        num_evicted_blocks=counters.num_evicted_blocks,
        num_received_blocks=counters.num_received_blocks,
    )


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _saved(num_used: int, num_table_entries: int) -> float:
    """A block on its way from or to the host is used and in no table, so there may be more of the first."""
    return max(0.0, _share(num_table_entries - num_used, num_table_entries))
