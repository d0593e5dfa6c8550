"""What the model of step times learns: lines are found, odd steps and sizes that never change do no harm."""

import pytest
from octavo.coordinator.core.step_time import StepLoad, StepTimeModel


def fitted(steps, duration):
    model = StepTimeModel()
    for num_decodes, num_chunk_tokens in steps:
        model.observe(StepLoad(num_decodes, num_chunk_tokens), duration(num_decodes, num_chunk_tokens))
    return model


def estimate(model, num_decodes, num_chunk_tokens):
    costs = model.costs(num_decodes)
    return costs.fixed_ms + costs.token_ms * num_chunk_tokens


def line(num_decodes, num_chunk_tokens):
    return 3.0 + 0.02 * (num_chunk_tokens + 2 * num_decodes)


def test_nothing_is_known_at_first():
    assert not StepTimeModel().is_fitted
    assert fitted([(0, 5)], line).is_fitted


@pytest.mark.parametrize("tokens_per_ms", [0.001, 1.0, 50.0])
def test_one_step_gives_the_priors_line_through_it(tokens_per_ms):
    """On any machine: half of what 256 tokens cost is fixed."""
    costs = fitted([(0, 256)], lambda _, n: n / tokens_per_ms).costs(0)
    assert costs.fixed_ms == pytest.approx(128 / tokens_per_ms)
    assert costs.token_ms == pytest.approx(0.5 / tokens_per_ms)


def test_a_line_is_found():
    model = fitted([(8, 128), (0, 512), (16, 300), (2, 1024)] * 20, line)
    for size in ((1, 64), (32, 256), (8, 640), (0, 2048)):
        assert estimate(model, *size) == pytest.approx(line(*size), rel=0.05)


def test_a_slow_step_is_an_exception():
    model = fitted([(4, 128), (4, 512)] * 20, line)
    model.observe(StepLoad(4, 256), 2_000.0)
    assert estimate(model, 4, 256) == pytest.approx(line(4, 256), rel=0.02)


def test_a_slower_machine_is_noticed():
    model = fitted([(4, 128), (4, 512)] * 20, line)
    for _ in range(100):
        model.observe(StepLoad(4, 256), 1.5 * line(4, 256))
    assert estimate(model, 4, 256) == pytest.approx(1.5 * line(4, 256), rel=0.05)


@pytest.mark.parametrize("duration", [lambda _, n: 5.0, lambda _, n: 5.0 - n / 1000, lambda _, n: n / 100])
def test_costs_are_never_negative_and_tokens_never_free(duration):
    costs = fitted([(1, 64), (1, 512), (1, 1024)] * 50, duration).costs(0)
    assert costs.fixed_ms >= 0
    assert costs.token_ms > 0.0001


def behind(num_tokens, context):
    """Tokens before each of a chunk's, together."""
    return num_tokens * context + num_tokens * (num_tokens - 1) // 2


def long_context_line(num_decodes, num_chunk_tokens, context, doubling_context):
    attended = behind(num_chunk_tokens, context)
    return 3.0 + 0.02 * (num_chunk_tokens + attended / doubling_context + 2 * num_decodes)


@pytest.mark.parametrize("doubling_context", [8_000, 16_384, 40_000])
def test_what_a_context_adds_is_found(doubling_context):
    model = StepTimeModel()
    for context in range(0, 100_000, 500):
        for num_tokens in (64, 200):
            time_ms = long_context_line(8, num_tokens, context, doubling_context)
            model.observe(StepLoad(8, num_tokens, behind(num_tokens, context), context), time_ms)
    costs = model.costs(8)
    assert costs.doubling_context == pytest.approx(doubling_context, rel=0.3)  # it is drawn a little to the prior's
    for num_tokens, context in ((32, 120_000), (500, 60_000), (128, 0)):
        found = costs.fixed_ms + costs.token_ms * costs.price(num_tokens, context)
        assert found == pytest.approx(long_context_line(8, num_tokens, context, doubling_context), rel=0.15)


def test_short_contexts_say_nothing_of_long_ones():
    model = StepTimeModel()
    for num_tokens in (64, 128, 256, 512) * 50:
        model.observe(StepLoad(4, num_tokens, behind(num_tokens, 0)), line(4, num_tokens))
    assert 12_000 < model.costs(4).doubling_context < 24_000


def test_prices_and_what_they_afford_agree():
    costs = fitted([(0, 256)], line).costs(0)
    for num_tokens, context in ((1, 0), (100, 5_000), (8192, 120_000)):
        assert costs.affordable(costs.price(num_tokens, context), context) == pytest.approx(num_tokens)
    assert costs.price(100, 0) == pytest.approx(100, rel=0.01)


def test_what_a_context_costs_any_chunk_is_found():
    model = StepTimeModel()
    for context in range(0, 100_000, 500):
        for num_tokens in (64, 200):
            time_ms = 3.0 + 0.02 * (num_tokens + 16) + context / 8000
            model.observe(StepLoad(8, num_tokens, behind(num_tokens, context), context), time_ms)
    costs = model.costs(8)
    assert costs.token_ms * costs.entry(100_000) == pytest.approx(12.5, rel=0.3)
    price = costs.entry(100_000) + costs.price(100, 100_000)
    assert costs.fixed_ms + costs.token_ms * price == pytest.approx(3.0 + 0.02 * 116 + 12.5, rel=0.1)
