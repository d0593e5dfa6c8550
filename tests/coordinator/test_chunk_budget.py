"""Budgets of a step's chunks, each rule by itself."""

from octavo.coordinator.core.chunk_budget import ChunkBudget, paced_budget
from octavo.coordinator.core.step_time import StepCosts

COSTS = StepCosts(fixed_ms=4.0, token_ms=0.02)


def paced(target_ms, num_backlog_tokens, costs=COSTS, limit=8192):
    """Tokens for one endless prompt."""
    return paced_budget(target_ms, costs, num_backlog_tokens, limit).take(1_000_000)


def test_an_unpaced_budget_is_used_to_its_last_token():
    budget = ChunkBudget(100)
    assert [budget.take(30), budget.take(69), budget.is_spent, budget.take(5)] == [30, 69, False, 1]
    assert budget.is_spent


def test_a_chunk_is_cut_to_granules_and_scraps_are_not_kept():
    budget = ChunkBudget(256, granule=64)
    assert [budget.take(70), budget.take(500)] == [70, 128]
    assert budget.is_spent
    assert ChunkBudget(256, granule=64).take(255) == 255


def test_a_budget_below_a_granule_serves_all_the_same():
    budget = ChunkBudget(5, granule=64)
    assert budget.take(500) == 5
    assert budget.is_spent
    assert ChunkBudget(0, granule=64).is_spent


def test_the_target_bounds_the_step():
    # (10 - 4) / 0.02 is 300 tokens, 4 granules; 1,024 tokens are four times that.
    assert paced(10.0, 1024) == 256
    assert paced(20.0, 1024) == 512  # 800 are allowed, and two steps are enough
    assert paced(30.0, 1024) == 1024


def test_a_backlog_is_shared_out_evenly():
    assert paced(12.0, 512) == 256  # not 384 and 128


def test_a_target_below_the_fixed_cost_leaves_a_floor():
    assert paced(3.0, 512) == 128


def test_a_deep_backlog_is_not_delayed_for_long():
    for num_backlog_tokens in (2_000, 10_000, 50_000):
        num_tokens = paced(10.0, num_backlog_tokens)
        num_extra_steps = num_backlog_tokens / num_tokens - num_backlog_tokens / 8192
        assert num_extra_steps * COSTS.fixed_ms < 60.0
    assert paced(10.0, 200_000) == 8192


def test_the_steps_limit_holds_in_any_case():
    assert paced(10.0, 1024, limit=200) == 192
    assert paced(10.0, 1024, limit=7) == 7
