"""Greedy tokens in float32 equal transformers', for every request, model, and pair of a rank count and a block size.

32 requests at once, of 1 to 600 prompt tokens; the token budget forces chunks, the block count forces preemption.
"""

import itertools

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

MAX_TOKENS = 16
NUM_BLOCK_TOKENS = 640  # of the KV cache: just over the longest sequence, so that others are preempted
LONGEST = 600

LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}  # fmt: skip
MODELS = {
    "mha": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "gqa": {"num_attention_heads": 8, "num_key_value_heads": 4},
    "fewer kv heads than ranks": {"num_attention_heads": 4, "num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "odd head_dim": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 20, "hidden_size": 48},
    "llama3 rope": {"rope_scaling": LLAMA3_ROPE},
    "linear rope": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    # Stretches beyond 56 tokens, which the longest prompts' outputs reach.
    "dynamic rope": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 56},
    "yarn rope": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}},
}


def prompts(vocab_size: int, longest: int = LONGEST) -> list[list[int]]:
    generator = np.random.default_rng(7)
    lengths = [1, 2, LONGEST, *generator.integers(3, 120, 24).tolist(), *generator.integers(120, LONGEST, 5).tolist()]
    return [generator.integers(0, vocab_size, min(length, longest)).tolist() for length in lengths]


def model_and_prompts(name, make_llama):
    """Prompts of a "dynamic" model are shorter than its context: a longer one transformers rotates as a whole, which no
    cache can, and only after a shorter one it forgets how far the request before had stretched."""
    path = make_llama(**({"max_position_embeddings": 1024, "eos_token_id": None} | MODELS[name]))
    return path, prompts(vocab_size=128, longest=MODELS[name].get("max_position_embeddings", LONGEST + 1) - 1)


def transformers_tokens(path, all_prompts) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    outputs = []
    with torch.inference_mode():
        for prompt in all_prompts:
            inputs = torch.tensor([prompt])
            out = model.generate(
                inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=MAX_TOKENS, min_new_tokens=MAX_TOKENS,
                do_sample=False, pad_token_id=0,
            )  # fmt: skip
            outputs.append(out[0, len(prompt) :].tolist())
    return outputs


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_on_gpus_equal_transformers_on_the_cpu(
    name, make_llama, run_engine, engine_options, sampling_params
):
    path, all_prompts = model_and_prompts(name, make_llama)
    expected = transformers_tokens(path, all_prompts)
    for tensor_parallel_size in (size for size in (1, 2, 4) if size <= torch.cuda.device_count()):
        for enforce_eager in (False, True):
            options = engine_options(
                tensor_parallel_size, num_blocks=NUM_BLOCK_TOKENS // 16, max_model_len=NUM_BLOCK_TOKENS, device="cuda",
                enforce_eager=enforce_eager,
            )  # fmt: skip
            result = run_engine(path, options, all_prompts, lambda i: sampling_params(MAX_TOKENS))
            assert result.tokens == expected, f"TP {tensor_parallel_size}, eager {enforce_eager}"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_chunks_of_all_sizes_through_cuda_graphs_equal_transformers(
    make_llama, run_engine, engine_options, sampling_params
):
    """Room for all requests at once: steps of 700 tokens in graphs, then one of some 4,000, above the largest graph."""
    path, all_prompts = model_and_prompts("gqa", make_llama)
    expected = transformers_tokens(path, all_prompts)
    for tensor_parallel_size in (size for size in (1, 2, 4) if size <= torch.cuda.device_count()):
        for max_num_batched_tokens in (700, 8192):
            options = engine_options(
                tensor_parallel_size, num_blocks=512, max_num_seqs=len(all_prompts), device="cuda",
                max_num_batched_tokens=max_num_batched_tokens,
            )  # fmt: skip
            result = run_engine(path, options, all_prompts, lambda i: sampling_params(MAX_TOKENS))
            assert result.tokens == expected, f"TP {tensor_parallel_size}, {max_num_batched_tokens} tokens"


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_steps_summed_in_halves_equal_transformers(make_llama, run_engine, engine_options, sampling_params):
    """Above 32 MiB, here 4,096 tokens, one half's sums run beside the other's products: first of prompts alone, then of
    prompts beside decodes, an odd number of tokens each time."""
    path = make_llama(
        hidden_size=2048, intermediate_size=2048, num_attention_heads=16, num_key_value_heads=4, num_hidden_layers=3,
        initializer_range=0.03, eos_token_id=None,
    )  # fmt: skip
    generator = np.random.default_rng(11)
    all_prompts = [generator.integers(0, 128, length).tolist() for length in generator.integers(400, 600, 24)]
    assert sum(map(len, all_prompts)) > 2 * 4501
    expected = transformers_tokens(path, all_prompts)
    for tensor_parallel_size in (size for size in (2, 4) if size <= torch.cuda.device_count()):
        options = engine_options(
            tensor_parallel_size, num_blocks=24 * 40, max_num_seqs=24, max_num_batched_tokens=4501, device="cuda"
        )
        result = run_engine(path, options, all_prompts, lambda i: sampling_params(MAX_TOKENS))
        assert result.tokens == expected, f"TP {tensor_parallel_size}"


# All pairs of a rank count and a block size, each on another model. Each model at each rank count:
# tests/workers/test_model.py.
PAIRS = itertools.product((1, 2, 4), (8, 16, 32))
CASES = [(name, *pair) for name, pair in zip(MODELS, PAIRS, strict=True)] + [("gqa", 2, 32), ("gqa", 4, 16)]


@pytest.mark.parametrize(("name", "tensor_parallel_size", "block_size"), CASES)
def test_greedy_tokens_equal_transformers(
    name, tensor_parallel_size, block_size, make_llama, run_engine, engine_options, sampling_params
):
    path, all_prompts = model_and_prompts(name, make_llama)
    num_blocks = NUM_BLOCK_TOKENS // block_size
    options = engine_options(tensor_parallel_size, block_size, num_blocks, max_model_len=NUM_BLOCK_TOKENS)
    result = run_engine(path, options, all_prompts, lambda i: sampling_params(MAX_TOKENS))
    expected = transformers_tokens(path, all_prompts)
    assert [i for i, tokens in enumerate(result.tokens) if tokens != expected[i]] == []
    assert result.num_preemptions > 0, "the block count was to force preemption"


def test_seeded_tokens_do_not_depend_on_batch_or_ranks(make_llama, run_engine, engine_options, sampling_params):
    path = make_llama(eos_token_id=None)
    all_prompts = prompts(vocab_size=128)[:12]

    def sampling(i):
        return sampling_params(
            MAX_TOKENS, temperature=0.9, top_k=(0, 20)[i % 2], top_p=(1.0, 0.9)[i // 2 % 2], min_p=0.01, seed=1000 + i,
            repetition_penalty=1.1, presence_penalty=0.2,
        )  # fmt: skip

    together = run_engine(path, engine_options(1), all_prompts, sampling)
    sharded = run_engine(path, engine_options(2, max_num_seqs=3, num_blocks=45), all_prompts, sampling)
    assert together.tokens == sharded.tokens
    alone = run_engine(path, engine_options(1, max_num_seqs=1), all_prompts, sampling)
    assert together.tokens == alone.tokens
