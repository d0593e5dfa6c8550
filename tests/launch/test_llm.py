"""What LLM refuses before it starts anything, and what it asks of a server that stands in for its own."""

import pytest
from octavo import LLM, BeamSearchParams, SamplingParams
from octavo.errors import InvalidArgumentError, NotFoundError


@pytest.mark.parametrize(
    "option",
    [
        "port",
        "grpc_port",
        "host",
        "first_request",
        "served_model_name",
        "max_restarts",
        "num_spare_ranks",
        "max_num_groups",
        "no_such_option",
    ],
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


@pytest.fixture
def make_llm(monkeypatch, fake_server):
    """An LLM whose gateway is the fake server."""

    class StandIn:
        local_addresses = (fake_server.address,)

        def __init__(self, config, display):
            pass

        def start(self):
            pass

        def stop(self, hurry):
            pass

    monkeypatch.setattr("octavo.launch.llm.Supervisor", StandIn)
    llms = []

    def make(**options):
        llms.append(LLM("model", **options))
        return llms[-1]

    yield make
    for llm in llms:
        llm.shutdown()


def test_several_samples_and_a_salt(make_llm, fake_server, samples):
    fake_server.answer = lambda request: samples("a", "b", "c")
    prompts = ["one", {"prompt": "two", "cache_salt": "mine"}]
    outputs = make_llm().generate(prompts, SamplingParams(n=3, best_of=4), use_tqdm=False)
    assert [[sample.text for sample in output.outputs] for output in outputs] == [["a", "b", "c"]] * 2
    assert [output.num_cached_tokens for output in outputs] == [1, 1]
    by_text = {request.text: request for request in fake_server.requests}
    assert (by_text["one"].cache_salt, by_text["two"].cache_salt) == ("", "mine")
    assert (by_text["one"].sampling_params.n, by_text["one"].sampling_params.best_of) == (3, 4)


def test_beam_search(make_llm, fake_server, samples):
    fake_server.answer = lambda request: samples("ab", "c", scores=[-0.5, -1])
    outputs = make_llm().beam_search(["Hi", {"prompt": "Hi"}], BeamSearchParams(beam_width=2, max_tokens=5))
    assert [[sequence.text for sequence in output.sequences] for output in outputs] == [["Hiab", "Hic"]] * 2
    assert [sequence.cum_logprob for sequence in outputs[0].sequences] == [-1, -1]
    assert fake_server.requests[0].sampling_params.num_beams == 2


def test_beam_search_without_a_tokenizer(make_llm, fake_server, samples):
    fake_server.answer = lambda request: samples("ab", scores=[-0.5])
    llm = make_llm(skip_tokenizer_init=True)
    [output] = llm.beam_search({"prompt_token_ids": [72, 105]}, BeamSearchParams(2, 5, n=1))
    assert [(sequence.tokens, sequence.text) for sequence in output.sequences] == [(list(b"Hiab"), None)]
