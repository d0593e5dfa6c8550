"""When the number of groups follows the load."""

from dataclasses import replace

import pytest
from octavo.launch.autoscale_policy import AutoscalePolicy, Load
from octavo.launch.autoscaler import load_of
from octavo.proto import admin_pb2

BUSY = Load(num_groups=2, num_waiting=5, num_running=32, max_num_seqs=16, num_used_blocks=50, num_blocks=200)
STEADY = replace(BUSY, num_waiting=0)
LIGHT = replace(STEADY, num_running=8)


def decisions(policy, *seen):
    """Of pairs: what is seen, when."""
    return [policy.decide(load, now) for load, now in seen]


def test_one_more_when_requests_have_waited_without_a_break():
    assert decisions(AutoscalePolicy(1, 3), (BUSY, 0), (BUSY, 4.9), (BUSY, 5)) == [None, None, 3]
    broken = (BUSY, 0), (BUSY, 4), (STEADY, 4.5), (BUSY, 5), (BUSY, 9), (BUSY, 10)
    assert decisions(AutoscalePolicy(1, 3), *broken) == [None] * 5 + [3]


def test_never_more_than_the_most_nor_fewer_than_the_least():
    assert decisions(AutoscalePolicy(1, 2), (BUSY, 0), (BUSY, 50)) == [None, None]
    assert decisions(AutoscalePolicy(2, 3), (LIGHT, 0), (LIGHT, 500)) == [None, None]
    alone = replace(LIGHT, num_groups=1, num_running=0, num_used_blocks=0)
    assert decisions(AutoscalePolicy(1, 3), (alone, 0), (alone, 500)) == [None, None]


@pytest.mark.parametrize(
    ("load", "is_light"),
    [
        (LIGHT, True),  # 8 of the 16 slots that would be left
        (replace(LIGHT, num_running=9), False),
        (replace(LIGHT, num_waiting=1), False),
        (replace(LIGHT, num_used_blocks=51), False),
    ],
)
def test_one_fewer_when_the_rest_would_be_half_full_for_a_minute(load, is_light):
    assert decisions(AutoscalePolicy(1, 2), (load, 0), (load, 59)) == [None] * 2
    assert decisions(AutoscalePolicy(1, 2), (load, 0), (LIGHT, 60)) == [None, 1 if is_light else None]


def test_after_a_change_the_load_is_judged_anew():
    policy = AutoscalePolicy(1, 9)
    decisions(policy, (BUSY, 0), (BUSY, 5))
    policy.note_change()
    assert decisions(policy, (BUSY, 6), (BUSY, 10), (BUSY, 11)) == [None, None, 3]


def test_a_change_that_failed_is_not_tried_again_at_once():
    policy = AutoscalePolicy(1, 9)
    policy.note_failure(100)
    assert decisions(policy, (BUSY, 101), (BUSY, 110), (BUSY, 159), (BUSY, 160)) == [None, None, None, 3]


def test_only_groups_that_serve_count():
    groups = [
        admin_pb2.GroupStatus(state=state, num_running=3, num_blocks=10, num_free_blocks=4)
        for state in (admin_pb2.GROUP_STATE_READY, admin_pb2.GROUP_STATE_DRAINING, admin_pb2.GROUP_STATE_READY)
    ]
    status = admin_pb2.GetStatusResponse(num_waiting=7, groups=groups)
    assert load_of(status, 16) == Load(2, 7, 6, 16, 12, 20)
