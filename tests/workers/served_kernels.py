"""Prints each kernel that a mix of steps needs and the start did not compile. Args: device, model directory,
dtype of the KV cache.

A process of its own: without a GPU it needs Triton as on one, while the tests' kernels run in the interpreter. Then
nothing is compiled or run: the variants that the start finds are compared with those that steps launch.
"""

import itertools
import sys
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
import triton
from octavo.proto import engine_pb2, sampling_pb2, worker_pb2
from octavo.workers import loading, prefix_groups, rank
from octavo.workers.kernel_compile import UnrecordedGraphs, launches_compile
from octavo.workers.parallel import TensorParallel
from octavo.workers.plan import Join, Plan
from octavo.workers.runner_builder import RunnerBuilder
from octavo.workers.segment_graphs import SegmentGraphs

NUM_SEQS, NUM_TOKENS = 80, 4608
EMPTY = np.zeros(0, dtype=np.int64)
SAMPLING = (
    {},
    {"temperature": 1.0},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 0.5, "top_p": 0.9},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 1.0, "top_k": 9, "top_p": 0.8, "min_p": 0.01, "num_logprobs": 3},
    {"frequency_penalty": 0.5},
    {"temperature": 1.0, "repetition_penalty": 1.2, "top_p": 0.5},
    {"logit_bias_token_ids": np.int32([3]).tobytes(), "logit_bias_values": np.float32([2]).tobytes()},
    {"temperature": 1.0, "presence_penalty": 0.2, "bad_words": [np.int32([3, 4]).tobytes()]},
    {"num_prompt_logprobs": 2},
)


def serve(runner):
    """Prompts and decodes of few and of many, alone and beside each other, with each kind of sampling."""
    for fields, num_rows in itertools.product(SAMPLING, (1, 33, NUM_SEQS - 1)):
        serve_batch(runner, num_rows, 3 + num_rows % 4, fields)
    for length in (100, 2500, 4096, NUM_TOKENS):
        serve_batch(runner, 1, length, {})
    for num_rows, num_tokens in itertools.product((1, 2, 3), (1, 2, 16, 40, 100)):
        serve_cached(runner, num_rows, num_tokens)
    for num_rows in (NUM_SEQS - 10, NUM_SEQS - 1):
        serve_shared(runner, num_rows)


def serve_batch(runner, num_rows, length, fields):
    slots = np.arange(num_rows)
    late = np.array([num_rows])
    joins = tuple(join(runner.shape, slot, length, fields) for slot in slots)
    run(runner, joins=joins, chunk_slots=slots, chunk_num_tokens=np.full(num_rows, length))
    run(runner, decode_slots=slots)
    # A prompt of 40 tokens comes in two parts beside the decodes.
    run(runner, joins=(join(runner.shape, num_rows, 40, fields),), chunk_slots=late, chunk_num_tokens=np.array([33]))
    run(runner, chunk_slots=late, chunk_num_tokens=np.array([7]))
    run(runner, leave_slots=np.arange(num_rows + 1), decode_slots=EMPTY)


def serve_cached(runner, num_rows, num_tokens):
    """Prompts found in the cache but for their last tokens, alone, and then beside a decode and a new prompt."""
    slots, length = np.arange(num_rows), 3000
    joins = tuple(join(runner.shape, slot, length, {}, length - num_tokens) for slot in slots)
    run(runner, joins=joins, chunk_slots=slots, chunk_num_tokens=np.full(num_rows, num_tokens))
    others = slots + num_rows
    joins = tuple(join(runner.shape, slot, length, {}, length - num_tokens) for slot in others)
    new, last = join(runner.shape, 2 * num_rows, 70, {}), [2 * num_rows]
    chunks, counts = np.array([*others, *last]), np.array([num_tokens] * num_rows + [70])
    run(runner, joins=(*joins, new), decode_slots=slots, chunk_slots=chunks, chunk_num_tokens=counts)
    run(runner, leave_slots=np.array([*slots, *chunks]), decode_slots=EMPTY)


def serve_shared(runner, num_rows):
    """Decodes of prompts that begin alike, alone and beside a prompt."""
    slots, late = np.arange(num_rows), np.array([num_rows])
    joins = tuple(join(runner.shape, slot, 3000, {}, 2999) for slot in slots)
    run(runner, joins=joins, decode_slots=slots)
    run(runner, joins=(join(runner.shape, num_rows, 40, {}),), chunk_slots=late, chunk_num_tokens=np.array([40]))
    run(runner, leave_slots=np.arange(num_rows + 1), decode_slots=EMPTY)


def join(shape, slot, length, fields, num_computed=0):
    defaults = {"top_p": 1.0, "repetition_penalty": 1.0, "max_tokens": 9, "seed": int(slot)}
    blocks = np.arange((length + 8) // shape.block_size + 1, dtype=np.int32)
    return Join(
        slot=int(slot),
        token_ids=np.ones(length, dtype=np.int32),
        num_prompt_tokens=length,
        num_computed_tokens=num_computed,
        block_ids=blocks,
        sampling_params=sampling_pb2.SamplingParams(**(defaults | fields)),
    )


def run(runner, **changes):
    defaults = {
        "epoch": 0, "step_id": 0, "leave_slots": EMPTY, "joins": (), "append_slots": EMPTY,
        "append_block_ids": EMPTY.astype(np.int32), "decode_slots": None, "chunk_slots": EMPTY,
        "chunk_num_tokens": EMPTY,
    }  # fmt: skip
    runner.execute(Plan(**(defaults | changes))).wait()


class Hopper:
    """A driver of a GPU that is not there."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)


def pretend_gpu():
    """Has a rank on the CPU launch what one on a Hopper GPU does."""
    from octavo.kernels import pdl, triton_ops  # noqa: F401 (all kernels, to be patched)
    from octavo.workers import model_runner
    from octavo.workers.models import llama
    from octavo.workers.sampler import triton_operations

    triton.runtime.driver.set_active(Hopper())
    for module in [module for name, module in sys.modules.items() if name.startswith("octavo.kernels.")]:
        for name, answer in (("has_pdl", lambda device: True), ("starts_early", lambda device, rows: rows <= 64)):
            if hasattr(module, name):
                setattr(module, name, answer)
    llama.operations_for = triton_ops.TritonOperations
    model_runner.sampler_operations_for = lambda device: triton_operations.TritonSamplerOperations()
    torch.Tensor.pin_memory = lambda tensor: tensor
    torch.backends.cuda.preferred_blas_library = lambda *library: None
    # No kernel of ours, and most of the time: a CPU takes long over bfloat16.
    torch.nn.functional.linear = lambda x, weight, bias=None: x.new_zeros(*x.shape[:-1], len(weight))


def start_here(config):
    """What the start finds on a pretended GPU, and a runner."""
    pretend_gpu()
    tp = TensorParallel(0, 1, torch.device("cpu"))
    loading.find_kernels(config, torch.bfloat16, tp, 1)
    request = worker_pb2.ConfigureRequest(epoch=1, rank=0, tensor_parallel_size=1, config=config)
    builder = RunnerBuilder(config, loading.load_now(request, tp, 1, fetch=None, record=None).model, tp, 1)
    cache = builder.kv_cache(1000)
    graphs = SegmentGraphs(builder.model, NUM_TOKENS, UnrecordedGraphs(), tp)
    runner = builder.runner(cache)
    with launches_compile():
        graphs.capture(cache)
        runner.capture_graphs(graphs)
    return runner


@contextmanager
def kernels_noted(is_real):
    """Yields the variants that are launched for the first time meanwhile, by name."""
    noted = {}

    def note(*, key, fn, **rest):
        noted[fn.name, key] = True
        return not is_real  # true: neither compiled nor launched

    triton.knobs.runtime.jit_cache_hook = note
    yield noted
    triton.knobs.runtime.jit_cache_hook = None


def main(device, model_path, kv_cache_dtype, num_ranks="1"):
    config = engine_pb2.WorkerConfig(
        model_path=model_path, load_format="dummy", dtype="bfloat16", block_size=16, max_model_len=5000,
        max_num_seqs=NUM_SEQS, max_num_batched_tokens=NUM_TOKENS, num_blocks_override=1000, gpu_memory_utilization=0.5,
        kv_cache_dtype=kv_cache_dtype,
    )  # fmt: skip
    is_real = device != "cpu"
    prefix_groups._MIN_SAVED_BYTES = 2**20  # or a model so small would never gain from sharing
    if num_ranks != "1":
        pretend_gpu()
        with kernels_noted(is_real=False) as found:
            one_of_them = TensorParallel(0, int(num_ranks), torch.device("cpu")).for_compiling()
            loading.find_kernels(config, torch.bfloat16, one_of_them, 1)
        print(f"{len(found)} found alone")
        return
    with kernels_noted(is_real) as started:
        if is_real:
            request = worker_pb2.ConfigureRequest(epoch=1, rank=0, tensor_parallel_size=1, config=config)
            *_, last = rank.build_rank(request, rank.RankSite(torch.device(device)))
            runner = last.runner
        else:
            runner = start_here(config)
    with kernels_noted(is_real) as served, nullcontext() if is_real else launches_compile():
        serve(runner)
    print(f"{len(started)} at the start")
    for name, key in served.keys() - started.keys():
        print("late:", name, key)


if __name__ == "__main__":
    main(*sys.argv[1:])
