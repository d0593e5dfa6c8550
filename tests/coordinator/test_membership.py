"""Groups come, fail, are rebuilt and given up: every transition, and what requests may hope for meanwhile."""

import pytest
from octavo.coordinator.core.membership import GroupState, Membership
from octavo.errors import FailedPreconditionError, NotFoundError


def of_one(rebuilds=True) -> Membership:
    membership = Membership(rebuilds)
    membership.begin(0)
    membership.admit(0)
    return membership


def test_each_incarnation_of_any_group_has_an_epoch_of_its_own_and_a_higher_one():
    membership = of_one()
    membership.begin(1)
    membership.admit(1)
    membership.fail(0, "it broke")
    epochs = [membership.groups[1].epoch, membership.begin(0).epoch]
    membership.check_invariants()
    assert epochs == [2, 3]
    membership.admit(0)
    assert (membership.groups[0].num_restarts, membership.groups[0].failure) == (1, "")
    membership.check_invariants()


def test_requests_may_hope_while_a_group_serves_or_may_come_back():
    membership = Membership(rebuilds=True)
    hopes, settled = [membership.has_prospects], [membership.is_settled]
    for event in (
        lambda: membership.begin(0),
        lambda: membership.admit(0),
        lambda: membership.fail(0, "it broke"),
        lambda: membership.begin(0),
        lambda: membership.fail(0, "and again"),
        lambda: membership.abandon(0),
    ):
        event()
        membership.check_invariants()
        hopes.append(membership.has_prospects)
        settled.append(membership.is_settled)
    # A group that starts for the first time may never be ready, and nobody has sent it anything.
    assert hopes == [False, False, True, True, True, True, False]
    assert settled == [True, False, True, False, False, False, True]


def test_without_anybody_to_rebuild_it_a_group_that_fails_is_no_hope():
    membership = of_one(rebuilds=False)
    assert membership.has_prospects
    membership.fail(0, "it broke")
    assert not membership.has_prospects


def test_a_new_group_that_cannot_start_is_forgotten_and_one_that_served_is_not():
    membership = of_one()
    membership.begin(1)
    membership.fail(1, "no room")
    assert list(membership.groups) == [0]
    membership.fail(0, "it broke")
    membership.begin(0)
    membership.fail(0, "no room")
    assert [group.failure for group in membership.awaiting_rebuild] == ["no room"]
    membership.abandon(0)
    assert membership.awaiting_rebuild == []


def test_what_cannot_be_is_refused():
    membership = of_one()
    with pytest.raises(FailedPreconditionError, match="group 0 exists already, and is ready"):
        membership.begin(0)
    with pytest.raises(FailedPreconditionError, match="group 0 has not failed"):
        membership.abandon(0)
    with pytest.raises(AssertionError, match="group 0 cannot go from READY to READY"):
        membership.admit(0)
    membership.fail(0, "it broke")
    with pytest.raises(AssertionError, match="group 0 cannot go from FAILED to FAILED"):
        membership.fail(0, "it broke")
    membership.begin(0)
    with pytest.raises(FailedPreconditionError, match="group 0 exists already, and is rebuilding"):
        membership.begin(0)
    assert membership.groups[0].state is GroupState.REBUILDING


def test_the_epochs_of_a_coordinator_are_above_those_of_all_before():
    last = 0
    for incarnation in range(3):
        membership = Membership(rebuilds=True, incarnation=incarnation)
        for group_id in range(1000):
            epoch = membership.begin(group_id, has_served=incarnation > 0).epoch
            assert epoch > last
            last = epoch
    assert last == 2_001_000


def test_a_group_that_served_under_an_earlier_coordinator_is_a_hope_and_may_fail_like_any_other():
    membership = Membership(rebuilds=True, incarnation=1)
    assert membership.begin(0, has_served=True).state is GroupState.REBUILDING
    assert membership.has_prospects
    assert not membership.is_settled
    membership.fail(0, "rank 1: no room")
    membership.check_invariants()
    assert [group.failure for group in membership.awaiting_rebuild] == ["rank 1: no room"]
    assert membership.begin(0, has_served=True).epoch == 1_000_002
    membership.admit(0)
    assert membership.groups[0].state is GroupState.READY
    with pytest.raises(FailedPreconditionError, match="group 0 exists already, and is ready"):
        membership.begin(0, has_served=True)


def of_two() -> Membership:
    membership = of_one()
    membership.begin(1)
    membership.admit(1)
    return membership


def test_a_group_drains_and_is_gone_and_its_id_may_come_again():
    membership = of_two()
    membership.drain(1)
    membership.check_invariants()
    assert membership.state(1) is GroupState.DRAINING
    assert (membership.has_prospects, membership.is_settled) == (True, True)
    with pytest.raises(FailedPreconditionError, match="group 1 exists already, and is draining"):
        membership.begin(1)
    membership.remove(1)
    assert list(membership.groups) == [0]


def test_only_a_group_that_serves_beside_another_may_drain():
    membership = of_two()
    membership.begin(2)
    membership.drain(1)
    for group_id, why in (
        (0, "group 0 is the last one"),
        (1, "it is draining"),
        (2, "it is starting"),
    ):
        with pytest.raises(FailedPreconditionError, match=why):
            membership.drain(group_id)
    with pytest.raises(NotFoundError, match="no group 3"):
        membership.drain(3)


def test_one_that_fails_while_it_drains_is_gone_and_nobody_is_to_rebuild_it():
    membership = of_two()
    membership.drain(1)
    membership.fail(1, "it broke")
    assert list(membership.groups) == [0]
    assert membership.awaiting_rebuild == []


def test_one_that_drains_is_no_prospect_and_serves_on_where_there_is_no_other():
    membership = of_two()
    membership.drain(1)
    membership.fail(0, "it broke")
    assert membership.has_prospects  # group 0 may come back
    membership.abandon(0)
    assert not membership.has_prospects
    assert membership.cancel_drains() == [1]
    assert membership.has_prospects
    membership.check_invariants()


def test_one_that_failed_may_be_forgotten():
    membership = of_two()
    membership.fail(1, "it broke")
    membership.remove(1)
    with pytest.raises(AssertionError):
        membership.remove(0)
