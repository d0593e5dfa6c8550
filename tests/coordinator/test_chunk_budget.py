"""How much prompt a step takes beside decodes, each rule by itself."""

import pytest
from octavo.coordinator.core.chunk_budget import ChunkBudget, counted_tokens, paced_num_tokens
from octavo.coordinator.core.step_time import StepCosts

COSTS = StepCosts(fixed_ms=2.0, token_ms=0.02)


def test_the_target_bounds_the_step():
    # (8 - 2) / 0.02 is 300 tokens; with 4 decodes, 252 fill tiles of 64.
    assert paced_num_tokens(8.0, COSTS, 4, num_backlog_tokens=252 * 4) == 252
    assert paced_num_tokens(18.0, COSTS, 4, num_backlog_tokens=764 * 2) == 764


@pytest.mark.parametrize("num_decodes", [1, 17, 64, 100])
def test_decodes_and_chunks_fill_tiles(num_decodes):
    for num_backlog_tokens in (1, 100, 1000, 10_000):
        num_tokens = paced_num_tokens(10.0, COSTS, num_decodes, num_backlog_tokens)
        assert num_tokens > 0
        assert (num_tokens + num_decodes) % 64 == 0


def test_a_backlog_is_shared_out_evenly():
    assert paced_num_tokens(18.0, COSTS, 4, num_backlog_tokens=1000) == 508  # 764 are allowed; two steps in any case


def test_a_target_below_the_fixed_cost_leaves_a_floor():
    assert paced_num_tokens(0.5, StepCosts(fixed_ms=1.0, token_ms=0.02), 4, num_backlog_tokens=1000) == 124


def test_a_step_is_not_cut_until_it_is_mostly_fixed_cost():
    # Tokens for twice the fixed cost: 2 * 9 / 0.01 are 1,800, of which 1,788 fill tiles with 4 decodes.
    assert paced_num_tokens(10.0, StepCosts(fixed_ms=9.0, token_ms=0.01), 4, num_backlog_tokens=1788 * 2) == 1788


def test_a_deep_backlog_is_not_delayed_for_long():
    for num_backlog_tokens in (2_000, 10_000, 50_000):
        num_steps = num_backlog_tokens / paced_num_tokens(10.0, COSTS, 4, num_backlog_tokens)
        assert num_steps * COSTS.fixed_ms < 60.0
    assert paced_num_tokens(10.0, COSTS, 4, 250_000) > 8192


def test_beside_a_long_prompt_streams_go_first():
    costs = StepCosts(fixed_ms=5.0, token_ms=0.02)
    # Twice the fixed cost is 500 tokens; within the target are 250, of which 188 fill tiles with 4 decodes.
    assert paced_num_tokens(10.0, costs, 4, 188 * 5, longest_prompt=8192) == 316  # a third
    assert paced_num_tokens(10.0, costs, 4, 188 * 5, longest_prompt=8193) == 188


LONG = StepCosts(fixed_ms=2.0, token_ms=0.02, doubling_context=16_000)


def test_without_a_price_a_step_takes_what_it_has_room_for():
    budget = ChunkBudget(1000)
    assert [budget.take(300, 100_000), budget.is_spent] == [300, False]
    assert [budget.take(3000, 0), budget.is_spent] == [700, True]


def test_behind_a_long_context_fewer_tokens_come_to_the_same():
    for context, num_tokens in ((0, 252), (16_000, 124), (48_000, 60), (128_000, 32)):
        budget = ChunkBudget(8192, LONG, 252, num_decodes=4)
        assert budget.take(5000, context) == num_tokens
        assert budget.is_spent


def test_short_prompts_share_a_price_in_whole_tiles():
    budget = ChunkBudget(8192, LONG, 252, num_decodes=4)
    assert [budget.take(100, 0), budget.take(100, 400), budget.take(100, 0)] == [100, 100, 52]
    assert budget.is_spent


def test_a_prompt_progresses_behind_any_context():
    assert ChunkBudget(8192, LONG, 100, num_decodes=4).take(5000, 10_000_000) == 32
    assert ChunkBudget(8192, LONG, 100, num_decodes=4).take(3, 10_000_000) == 3
    assert ChunkBudget(5, LONG, 100, num_decodes=4).take(5000, 10_000_000) == 5


def test_of_a_long_prompt_only_so_much_counts_as_a_queue():
    assert [counted_tokens(price) for price in (0, 99.2, 2048, 100_000.0)] == [0, 100, 2048, 2048]


def test_behind_a_context_that_is_over_the_price_by_itself_a_quarter_of_its_cost_is_added():
    costs = StepCosts(fixed_ms=2.0, token_ms=0.02, entry_price=0.01)
    assert ChunkBudget(8192, costs, 300, num_decodes=4).take(5000, 10_000) == 188  # 100 before the first token
    assert ChunkBudget(8192, costs, 300, num_decodes=4).take(5000, 28_000) == 64  # 280, and 70
    assert ChunkBudget(8192, costs, 300, num_decodes=4).take(5000, 68_000) == 188  # 680, and 170


def test_behind_a_long_context_chunks_are_as_many_tokens_as_attention_takes_at_once():
    for price, num_tokens in ((100, 32), (280, 32), (340, 32), (480, 48), (600, 64)):
        assert ChunkBudget(8192, LONG, price, num_decodes=20).take(5000, 128_000) == num_tokens


def test_beside_a_long_prompt_the_target_has_a_margin():
    costs = StepCosts(fixed_ms=5.0, token_ms=0.01)
    # 500 tokens are within the target, of which 444 fill tiles with 4 decodes; within 94 % of it are 440.
    assert paced_num_tokens(10.0, costs, 4, 380 * 2, longest_prompt=8193) == 380
