"""In bfloat16 the engine is as near to the float32 model as transformers is, at every batch size and rank count.

The tokens that the engine chose are given to transformers, so that one early difference does not make all that follows
differ. On GPUs the model is wide enough for the kernels that serve small batches in half precision.
"""

from itertools import chain

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

# Distances of logprobs from the float32 model's, beside those of transformers in bfloat16: sums in another order.
MEAN_RATIO = 1.15
MAX_RATIO = 1.6

SMALL = {"max_position_embeddings": 256, "eos_token_id": None}
WIDE = SMALL | {
    "hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 8, "num_key_value_heads": 4,
    "num_hidden_layers": 4, "vocab_size": 4096, "initializer_range": 0.04,
}  # fmt: skip


def num_output_tokens(request: int) -> int:
    """Other for each, so that the batch shrinks through all its sizes, down to one."""
    return 2 + request


def random_prompts(num_prompts: int, vocab_size: int) -> list[list[int]]:
    generator = np.random.default_rng(5)
    lengths = generator.integers(1, 200, num_prompts)
    return [generator.integers(0, vocab_size, length).tolist() for length in lengths]


def transformers_logprobs(path, dtype, device, prompts, outputs) -> torch.Tensor:
    """Of all requests' output tokens, each after what came before it."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval()
    found = []
    with torch.inference_mode():
        for prompt, output in zip(prompts, outputs, strict=True):
            logits = model(torch.tensor([prompt + output], device=device)).logits[0, len(prompt) - 1 : -1]
            chosen = torch.tensor(output, device=device)[:, None]
            found.append(logits.float().log_softmax(-1).gather(1, chosen).squeeze(1).cpu())
    return torch.cat(found)


def check(path, device, options, prompts, run_engine, sampling_params) -> None:
    result = run_engine(path, options, prompts, lambda i: sampling_params(num_output_tokens(i), num_logprobs=0))
    assert [len(tokens) for tokens in result.tokens] == [num_output_tokens(i) for i in range(len(prompts))]
    exact = transformers_logprobs(path, torch.float32, device, prompts, result.tokens)
    theirs = (transformers_logprobs(path, torch.bfloat16, device, prompts, result.tokens) - exact).abs()
    ours = (torch.tensor(list(chain.from_iterable(result.logprobs))) - exact).abs()
    for name, errors in (("octavo", ours), ("transformers", theirs)):
        print(f"TP {options.tensor_parallel_size}: {name} at most {errors.max():.4f}, mean {errors.mean():.5f}")
    assert ours.mean() < MEAN_RATIO * theirs.mean()
    assert ours.max() < MAX_RATIO * theirs.max()


@pytest.mark.parametrize("tensor_parallel_size", [1, 2])
def test_logprobs_follow_transformers(tensor_parallel_size, make_llama, run_engine, engine_options, sampling_params):
    path = make_llama(**SMALL | {"initializer_range": 0.1})
    options = engine_options(tensor_parallel_size, dtype="bfloat16")
    check(path, "cpu", options, random_prompts(12, 128), run_engine, sampling_params)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("enforce_eager", [False, True])
def test_logprobs_on_gpus_follow_transformers(enforce_eager, make_llama, run_engine, engine_options, sampling_params):
    path = make_llama(**WIDE)
    prompts = random_prompts(80, 4096)
    for tensor_parallel_size in (size for size in (1, 2, 4) if size <= torch.cuda.device_count()):
        options = engine_options(
            tensor_parallel_size, max_num_seqs=80, num_blocks=80 * 20, max_num_batched_tokens=512, dtype="bfloat16",
            device="cuda", enforce_eager=enforce_eager,
        )  # fmt: skip
        check(path, "cuda:0", options, prompts, run_engine, sampling_params)
