"""Length mixes have the paper's means, and shares are those of the steps between two snapshots."""

import pytest
from octavo.benchmarks.length_mix import ALPACA, SHAREGPT
from octavo.benchmarks.memory import SAMPLING, BlockMeans, MemorySettings, sharing_cases
from octavo.errors import InternalError, InvalidArgumentError
from octavo.launch.beam_search import BeamSearchParams
from octavo.launch.cli import run as run_octavo
from octavo.launch.sampling_params import SamplingParams
from octavo.proto import admin_pb2


@pytest.mark.parametrize(("mix", "means"), [(SHAREGPT, (161, 338)), (ALPACA, (19, 58))])
@pytest.mark.parametrize("num_requests", [16, 500])
def test_mixes_have_the_means_of_the_papers_data_sets(mix, means, num_requests):
    lengths = mix.sample(num_requests, max_model_len=16_384, seed=1)
    for index, mean in enumerate(means):
        assert sum(length[index] for length in lengths) / num_requests == pytest.approx(mean, rel=0.03)


def test_mixes_follow_from_their_seed():
    assert SHAREGPT.sample(20, 2048, seed=3) == SHAREGPT.sample(20, 2048, seed=3)
    assert SHAREGPT.sample(20, 2048, seed=3) != SHAREGPT.sample(20, 2048, seed=4)


def test_lengths_spread_and_fit_the_model():
    lengths = SHAREGPT.sample(1000, max_model_len=1024, seed=0)
    assert all(1 <= prompt <= 512 and 1 <= output <= 1024 - prompt for prompt, output in lengths)
    outputs = sorted(output for _, output in lengths)
    assert outputs[100] < 90
    assert outputs[900] > 650


def test_means_are_of_the_steps_between_two_snapshots():
    before = admin_pb2.BlockCounters(num_steps=10, sum_used=100, sum_table_entries=150, sum_empty_places=80)
    after = admin_pb2.BlockCounters(
        num_steps=20, sum_used=160, sum_table_entries=250, sum_empty_places=144, num_copied_blocks=3
    )
    means = BlockMeans.between(before, after, block_size=16)
    assert (means.num_steps, means.num_copied) == (10, 3)
    assert (means.waste, means.saved) == pytest.approx((64 / 1600, 0.4))
    with pytest.raises(InternalError):
        BlockMeans.between(after, after, 16)


def test_every_way_of_sharing_is_measured_at_every_width():
    cases = sharing_cases((2, 6))
    assert len(cases) == 8
    for case in cases:
        params = case.params(output_len=7)
        if case.way == SAMPLING:
            assert isinstance(params, SamplingParams)
            assert (params.n, params.temperature) == (case.width, 1.0)
        else:
            assert isinstance(params, BeamSearchParams)
            assert params.beam_width == case.width
        assert (params.max_tokens, params.ignore_eos) == (7, True)


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(InvalidArgumentError, match="num_prompts must be at least 1, got 0"):
        MemorySettings({"Alpaca": 0}, (2,), seed=0)
    with pytest.raises(InvalidArgumentError, match="width must be at least 2"):
        MemorySettings({"Alpaca": 1}, (1,), seed=0)


def test_only_samples_and_beams_share_unless_asked_for(monkeypatch):
    configs = []
    monkeypatch.setattr("octavo.benchmarks.block_commands.run_memory", lambda config, *_: configs.append(config))
    assert run_octavo(["bench", "memory", "--block-size", "32"]) == 0
    (config,) = configs
    assert (config.enable_prefix_caching, config.block_size) == (False, 32)
    assert config.model.endswith("cpu-6m")
