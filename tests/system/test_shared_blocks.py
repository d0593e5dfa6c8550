"""Sequences that share, fork, lose and regain blocks give the tokens of an undisturbed run, which are transformers'."""

import numpy as np
import pytest
import torch
from octavo.proto import engine_pb2
from transformers import AutoModelForCausalLM

MAX_TOKENS = 12
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]
EARLY_STOPPING = {
    False: engine_pb2.EARLY_STOPPING_HEURISTIC,
    True: engine_pb2.EARLY_STOPPING_FIRST,
    "never": engine_pb2.EARLY_STOPPING_NEVER,
}


def beam_cases():
    """(num_beams, num_outputs, length_penalty, early_stopping) of one request each."""
    return [
        (num_beams, num_outputs, length_penalty, early_stopping)
        for num_beams, num_outputs in ((2, 1), (3, 3), (4, 2))
        for length_penalty, early_stopping in ((1.0, False), (0.0, "never"), (2.0, True), (-1.0, False), (1.5, "never"))
    ]


def beam_search(case) -> engine_pb2.BeamSearch:
    num_beams, _, length_penalty, early_stopping = case
    return engine_pb2.BeamSearch(
        num_beams=num_beams, length_penalty=length_penalty, early_stopping=EARLY_STOPPING[early_stopping]
    )


def random_prompts(num_prompts: int, longest: int, seed: int = 3) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(2, 128, length).tolist() for length in generator.integers(1, longest, num_prompts)]


def transformers_beams(path, prompt, case, stop_token_ids) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    num_beams, num_outputs, length_penalty, early_stopping = case
    inputs = torch.tensor([prompt])
    with torch.inference_mode():
        outputs = model.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=MAX_TOKENS, num_beams=num_beams,
            num_return_sequences=num_outputs, length_penalty=length_penalty, early_stopping=early_stopping,
            do_sample=False, eos_token_id=stop_token_ids, pad_token_id=0,
        )  # fmt: skip
    return [_until_stop(output, stop_token_ids) for output in outputs[:, len(prompt) :].tolist()]


def _until_stop(output: list[int], stop_token_ids: list[int]) -> list[int]:
    """Without the padding behind."""
    ends = (i + 1 for i, token_id in enumerate(output) if token_id in stop_token_ids)
    return output[: next(ends, len(output))]


def num_ranks(wanted: int, device: str) -> int:
    return wanted if device == "cpu" else min(wanted, torch.cuda.device_count())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "stop_token_ids", [[1], list(range(2, 22)), [0]], ids=["stops seldom", "stops often", "stops not"]
)
def test_beam_search_equals_transformers(
    stop_token_ids, device, make_llama, run_requests, request_of, engine_options, sampling_params
):
    path = make_llama(eos_token_id=None)
    prompts = random_prompts(len(beam_cases()), longest=60)
    expected = [
        transformers_beams(path, prompt, case, stop_token_ids)
        for prompt, case in zip(prompts, beam_cases(), strict=True)
    ]
    sampling = sampling_params(MAX_TOKENS, stop_token_ids=np.array(stop_token_ids, "<i4").tobytes())
    num_preemptions = 0
    for tensor_parallel_size, block_size, num_block_tokens in ((1, 8, 4096), (2, 16, 384), (1, 8, 384)):
        requests = [
            request_of(prompt, sampling, num_samples=case[1], beam_search=beam_search(case))
            for prompt, case in zip(prompts, beam_cases(), strict=True)
        ]
        num_blocks = num_block_tokens // block_size
        ranks = num_ranks(tensor_parallel_size, device)
        options = engine_options(ranks, block_size, num_blocks, max_model_len=72, device=device)
        result = run_requests(path, options, requests)
        assert result.outputs == expected, f"TP {tensor_parallel_size}, block size {block_size}"
        assert result.blocks.num_copied_blocks > 0
        num_preemptions += result.num_preemptions
    assert num_preemptions > 0, "the block count was to force preemption"


@pytest.mark.parametrize("device", DEVICES)
def test_samples_are_those_of_single_requests(
    device, make_llama, run_requests, request_of, engine_options, sampling_params
):
    path = make_llama(eos_token_id=None)
    prompts = random_prompts(8, longest=80)

    def sampling(i, offset=0):
        return sampling_params(MAX_TOKENS, temperature=0.9, seed=100 * i + offset, presence_penalty=0.3)

    single = [request_of(prompt, sampling(i, j)) for i, prompt in enumerate(prompts) for j in range(3)]
    alone = run_requests(path, engine_options(1, enable_prefix_caching=False, device=device), single)
    expected = [alone.tokens[3 * i : 3 * i + 3] for i in range(len(prompts))]
    requests = [request_of(prompt, sampling(i), num_samples=3) for i, prompt in enumerate(prompts)]
    for options in (
        engine_options(1, device=device),
        engine_options(num_ranks(2, device), block_size=8, num_blocks=24, max_model_len=100, device=device),
        engine_options(1, enable_prefix_caching=False, max_num_seqs=2, num_inflight_steps=4, device=device),
    ):
        result = run_requests(path, options, requests)
        assert result.outputs == expected, options
        assert result.blocks.num_copied_blocks > 0


@pytest.mark.parametrize("device", DEVICES)
def test_blocks_that_come_and_go_change_no_token(
    device, make_llama, run_requests, request_of, engine_options, sampling_params
):
    """Prompts that begin alike, in a cache for one or two of them, with and without a host tier behind it."""
    path = make_llama(eos_token_id=None)
    starts = random_prompts(3, longest=200, seed=1)
    prompts = [starts[i % 3] + tail for i, tail in enumerate(random_prompts(24, longest=60, seed=2))]
    requests = [request_of(prompt, sampling_params(MAX_TOKENS)) for prompt in prompts]
    options = engine_options(1, enable_prefix_caching=False, num_blocks=512, device=device)
    undisturbed = run_requests(path, options, requests)
    assert not any(undisturbed.num_cached_tokens)
    for tensor_parallel_size, block_size, num_host_blocks in ((1, 8, 0), (1, 16, 64), (2, 8, 200), (1, 32, 3)):
        options = engine_options(
            num_ranks(tensor_parallel_size, device), block_size, 320 // block_size, max_model_len=300,
            num_host_blocks=num_host_blocks, device=device,
        )  # fmt: skip
        result = run_requests(path, options, requests)
        assert result.tokens == undisturbed.tokens, options
        assert sum(result.num_cached_tokens) > 0
        assert (result.blocks.num_saved_blocks > 0) == (num_host_blocks > 0)
        if num_host_blocks > 50:
            assert result.blocks.num_loaded_blocks > 0
