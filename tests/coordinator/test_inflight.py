"""How many steps are in flight: as many as the workers need to find the next one there."""

import pytest
from octavo.coordinator.core.worker_group import GroupMemory, WorkerGroup


def most_in_flight(step_us: int, configured: int) -> int:
    """Of a group whose last step took `step_us`; 0: not measured."""
    group = WorkerGroup(0, GroupMemory(num_blocks=8), block_size=16, max_num_seqs=2)
    group.dispatch(group.begin_step())
    group.take_result(step_us)
    while group.has_room_in_flight(configured):
        group.dispatch(group.begin_step())
    return len(group.inflight)


@pytest.mark.parametrize(
    ("step_us", "configured", "expected"),
    [
        (0, 2, 2),
        (100_000, 2, 2),
        (3_000, 2, 2),
        (2_900, 2, 3),
        (1_500, 2, 3),
        (1_400, 2, 4),
        (10, 2, 4),
        (10, 1, 3),
        (1_400, 8, 8),
    ],
)
def test_short_steps_are_sent_further_ahead(step_us, configured, expected):
    assert most_in_flight(step_us, configured) == expected
