"""What LLM refuses before it starts anything."""

import pytest
from octavo import LLM
from octavo.errors import InvalidArgumentError, NotFoundError


@pytest.mark.parametrize(
    "option", ["port", "grpc_port", "host", "first_request", "served_model_name", "no_such_option"]
)
def test_an_option_that_is_not_for_offline_use_is_refused(option):
    with pytest.raises(InvalidArgumentError, match=option) as refusal:
        LLM("model", **{option: 1})
    assert refusal.value.field == option


@pytest.mark.parametrize(("option", "value"), [("block_size", "8"), ("device", "tpu"), ("max_num_seqs", True)])
def test_a_value_of_a_wrong_type_is_refused(option, value):
    with pytest.raises(InvalidArgumentError, match=option):
        LLM("model", **{option: value})


def test_a_missing_model_is_said_so():
    with pytest.raises(NotFoundError, match="/no/such/model"):
        LLM("/no/such/model")


@pytest.fixture
def config_of(monkeypatch):
    """config_of(**options) -> the ServeConfig that LLM makes of them."""
    configs = []

    def supervisor(config, display):
        configs.append(config)
        raise NotFoundError("no model is started here")

    def make(**options):
        with pytest.raises(NotFoundError):
            LLM("model", **options)
        return configs[-1]

    monkeypatch.setattr("octavo.launch.llm.Supervisor", supervisor)
    return make


@pytest.mark.parametrize(("options", "expected"), [({}, 0.0), ({"itl_target_ms": 5}, 5)])
def test_prompts_are_cut_for_streams_only_when_asked(config_of, options, expected):
    assert config_of(**options).itl_target_ms == expected


def test_what_is_kept_of_the_kv_cache(config_of):
    assert (config_of().swap_space, config_of().enable_prefix_caching) == (0, True)
    config = config_of(swap_space=4, enable_prefix_caching=False)
    assert (config.swap_space, config.enable_prefix_caching) == (4, False)
