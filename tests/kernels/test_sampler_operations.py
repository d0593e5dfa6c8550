"""The GPU's sampler and the CPU's against torch's: the same tokens for any parameters and any batch."""

import numpy as np
import pytest
import torch
from octavo.proto import sampling_pb2
from octavo.workers.parallel import TensorParallel
from octavo.workers.sampler.batch import build_batch
from octavo.workers.sampler.cpu_operations import CpuSamplerOperations
from octavo.workers.sampler.operations import SamplerOperations, sampler_operations_for
from octavo.workers.sampler.sampler import Context, sample
from octavo.workers.sampler.table import SamplingTable
from octavo.workers.sampler.triton_operations import TritonSamplerOperations
from octavo.workers.sampler.vocab import VocabSlice

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCAB_SIZE, PADDED_SIZE = 2999, 3008
NUM_ROWS = 24


def pack(values, dtype="<i4") -> bytes:
    return np.asarray(values, dtype=dtype).tobytes()


def random_params(random: np.random.Generator) -> sampling_pb2.SamplingParams:
    """Each parameter off in some rows."""
    fields = {
        "temperature": float(random.choice([0.0, 0.4, 1.0, 1.7])),
        "top_k": int(random.choice([0, 1, 50, 1000, VOCAB_SIZE])),
        "top_p": float(random.choice([1.0, 0.9, 0.5, 0.01])),
        "min_p": float(random.choice([0.0, 0.02, 0.3])),
        "presence_penalty": float(random.choice([0.0, 1.5])),
        "frequency_penalty": float(random.choice([0.0, 0.7, -1.0])),
        "repetition_penalty": float(random.choice([1.0, 1.3])),
        "seed": int(random.integers(0, 2**63)),
        "max_tokens": 9,
    }
    if random.random() < 0.3:
        fields |= {"logit_bias_token_ids": pack([5, 2990]), "logit_bias_values": pack([3.0, -100.0], "<f4")}
    if random.random() < 0.3:
        fields |= {"num_logprobs": 2}
    return sampling_pb2.SamplingParams(**fields)


def sampled(
    ops: SamplerOperations, dtype: torch.dtype, params: list, start: int = 0, device: torch.device = DEVICE
) -> list[int]:
    """The tokens of one random row for each of `params`, the same rows in every call, from token `start` on."""
    random = np.random.default_rng(3)
    table = SamplingTable(len(params))
    for slot, row in enumerate(params):
        table.join(slot, row, VOCAB_SIZE)
    lengths = random.integers(2, 40, len(params))
    token_table = torch.tensor(random.integers(0, VOCAB_SIZE, (len(params), 64)), dtype=torch.int32, device=device)
    logits = torch.tensor(random.normal(0, 4, (len(params), PADDED_SIZE)))
    logits[:, VOCAB_SIZE:] = -torch.inf
    vocab = VocabSlice(TensorParallel(0, 1, device), start, PADDED_SIZE - start, VOCAB_SIZE)
    batch = build_batch(table, np.arange(len(params)), lengths // 2, vocab)
    context = Context(token_table, torch.tensor(lengths, device=device), int(lengths.max()))
    return sample(logits[:, start:].to(device, dtype), batch, context, vocab, ops).token_ids.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("start", [0, 1001])
def test_tokens_are_the_ones_that_torch_draws(start, dtype):
    random = np.random.default_rng(7)
    params = [random_params(random) for _ in range(NUM_ROWS)]
    expected = sampled(SamplerOperations(), dtype, params, start)
    assert sampled(TritonSamplerOperations(), dtype, params, start) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("start", [0, 1001, 1002, 2998])
def test_a_cpu_draws_the_same_tokens(start, dtype):
    random, cpu = np.random.default_rng(11), torch.device("cpu")
    params = [random_params(random) for _ in range(NUM_ROWS)]
    expected = sampled(SamplerOperations(), dtype, params, start, cpu)
    assert sampled(CpuSamplerOperations(), dtype, params, start, cpu) == expected


@pytest.mark.parametrize("fields", [{}, {"temperature": 0.8}, {"temperature": 0.8, "top_k": 3}])
def test_batches_without_most_features(fields):
    params = [sampling_pb2.SamplingParams(**({"top_p": 1.0, "repetition_penalty": 1.0, "seed": 5} | fields))] * 3
    expected = sampled(SamplerOperations(), torch.bfloat16, params)
    assert sampled(TritonSamplerOperations(), torch.bfloat16, params) == expected


def test_each_device_gets_its_own():
    assert type(sampler_operations_for(torch.device("cpu"))) is CpuSamplerOperations
    assert type(sampler_operations_for(torch.device("cuda"))) is TritonSamplerOperations
