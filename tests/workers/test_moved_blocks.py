"""Sequences whose blocks were copied, saved and loaded compute what undisturbed ones do; the oracle is transformers."""

import numpy as np
import pytest
import torch
from octavo.errors import FailedPreconditionError
from octavo.proto import engine_pb2, sampling_pb2, worker_pb2
from octavo.workers.plan import decode_plan
from octavo.workers.rank import build_rank
from transformers import AutoModelForCausalLM

PROMPT = [5, 9, 100, 3, 77, 42, 8, 19, 64, 2, 31]


def pack(values, dtype="<i4") -> bytes:
    return np.asarray(list(values), dtype=dtype).tobytes()


def join(slot, token_ids, blocks, num_prompt=11, num_computed=0) -> worker_pb2.SlotJoin:
    return worker_pb2.SlotJoin(
        slot=slot, token_ids=pack(token_ids), num_prompt_tokens=num_prompt, num_computed_tokens=num_computed,
        block_ids=pack(blocks),
        sampling_params=sampling_pb2.SamplingParams(top_p=1.0, repetition_penalty=1.0, max_tokens=50),
    )  # fmt: skip


class Driver:
    """Sends plans to a runner. Slots, ids and pairs are given as lists; pairs are (from, to)."""

    def __init__(self, runner) -> None:
        self.runner, self.step_id = runner, 0

    def start(self, decode=None, chunks=(), amend=(), copies=(), saves=(), loads=(), leave=(), **fields):
        """Queues a step. chunks: (slot, tokens); amend: (slot, token id)."""
        self.step_id += 1
        message = worker_pb2.BatchPlan(
            step_id=self.step_id,
            leave_slots=pack(leave, "<u2"),
            decode_slots_changed=decode is not None,
            decode_slots=pack(decode or (), "<u2"),
            chunk_slots=pack((slot for slot, _ in chunks), "<u2"),
            chunk_num_tokens=pack(count for _, count in chunks),
            amend_slots=pack((slot for slot, _ in amend), "<u2"),
            amend_token_ids=pack(token_id for _, token_id in amend),
            copy_from_block_ids=pack(source for source, _ in copies),
            copy_to_block_ids=pack(target for _, target in copies),
            save_block_ids=pack(source for source, _ in saves),
            save_host_ids=pack(target for _, target in saves),
            load_host_ids=pack(source for source, _ in loads),
            load_block_ids=pack(target for _, target in loads),
            **fields,
        )
        return self.runner.execute(decode_plan(message))

    def step(self, **changes) -> list[int]:
        return tokens(self.start(**changes).wait())


def tokens(result) -> list[int]:
    return np.frombuffer(result.token_ids, "<i4").tolist()


@pytest.fixture
def make_driver(make_llama):
    """make_driver(**fields of WorkerConfig)."""

    def make(device="cpu", **fields) -> Driver:
        config = engine_pb2.WorkerConfig(
            model_path=str(make_llama(eos_token_id=None)), load_format="safetensors", dtype="float32",
            **({
                "block_size": 8, "max_model_len": 256, "max_num_seqs": 8, "max_num_batched_tokens": 64,
                "gpu_memory_utilization": 0.9, "num_blocks_override": 64,
            } | fields),
        )  # fmt: skip
        request = worker_pb2.ConfigureRequest(config=config, rank=0, tensor_parallel_size=1, epoch=1)
        return Driver(list(build_rank(request, torch.device(device), None))[-1].runner)

    return make


@pytest.fixture
def greedy(make_llama):
    """greedy(token_ids, n) -> the n tokens that transformers continues them with."""
    model = AutoModelForCausalLM.from_pretrained(make_llama(eos_token_id=None), dtype=torch.float32).eval()

    def continue_greedily(token_ids, num_tokens) -> list[int]:
        known = list(token_ids)
        for _ in range(num_tokens):
            with torch.inference_mode():
                known.append(int(model(torch.tensor([known])).logits[0, -1].argmax()))
        return known[len(token_ids) :]

    return continue_greedily


def check_fork(driver, greedy, block_size) -> None:
    """Two sequences from one: the second with a copy of the partial block and another newest token."""
    prompt = (PROMPT * 13)[: block_size + 1]  # one full block, and the first token of the next
    found = driver.step(joins=[join(0, prompt, [4, 2], len(prompt))], chunks=[(0, len(prompt))])
    found += driver.step(decode=[0])
    fork = [*prompt, *found]
    other = (fork[-1] + 1) % 128
    forked = join(1, fork, [4, 7], len(prompt), len(fork) - 1)
    pairs = [driver.step(joins=[forked], copies=[(2, 7)], amend=[(1, other)], decode=[0, 1])]
    pairs += [driver.step() for _ in range(4)]
    first, second = map(list, zip(*pairs, strict=True))
    assert found + first == greedy(prompt, 7)
    assert second == greedy([*fork[:-1], other], 5)


@pytest.mark.parametrize("block_size", [8, 16, 64, 128])
def test_a_fork_goes_its_own_way(block_size, make_driver, greedy):
    check_fork(make_driver(block_size=block_size, max_num_batched_tokens=256), greedy, block_size)


def test_a_token_that_was_sampled_is_amended_before_it_is_computed(make_driver, greedy):
    driver = make_driver()
    sampled = driver.step(joins=[join(0, PROMPT, [0, 1, 2])], chunks=[(0, len(PROMPT))])[0]
    other = (sampled + 1) % 128
    assert driver.step(amend=[(0, other)], decode=[0]) == greedy([*PROMPT, other], 1)


def test_a_plan_without_rows_copies_and_answers(make_driver, greedy):
    driver = make_driver()
    found = driver.step(joins=[join(0, PROMPT, [0, 1])], chunks=[(0, len(PROMPT))])
    assert driver.step(leave=[0], copies=[(0, 5), (1, 6)]) == []
    again = join(3, [*PROMPT, *found], [5, 6], num_computed=len(PROMPT))
    assert driver.step(joins=[again], decode=[3]) == greedy([*PROMPT, *found], 1)


def test_copies_of_blocks_that_are_not_there_are_refused(make_driver):
    with pytest.raises(FailedPreconditionError, match=r"a block id is not in \[0, 64\)"):
        make_driver().step(copies=[(0, 64)])
