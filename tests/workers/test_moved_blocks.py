"""Sequences whose blocks were copied, saved and loaded compute what undisturbed ones do; the oracle is transformers."""

import numpy as np
import pytest
import torch
from octavo.errors import FailedPreconditionError, ResourceExhaustedError
from octavo.proto import engine_pb2, sampling_pb2, worker_pb2
from octavo.workers.plan import decode_plan
from octavo.workers.rank import RankSite, build_rank
from transformers import AutoModelForCausalLM

DEVICES = [
    "cpu",
    pytest.param(
        "cuda:0",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]
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
            load_format="safetensors", dtype="float32",
            **({
                "model_path": str(make_llama(eos_token_id=None)),
                "block_size": 8, "max_model_len": 256, "max_num_seqs": 8, "max_num_batched_tokens": 64,
                "gpu_memory_utilization": 0.9, "num_blocks_override": 64,
            } | fields),
        )  # fmt: skip
        request = worker_pb2.ConfigureRequest(config=config, rank=0, tensor_parallel_size=1, epoch=1)
        return Driver(list(build_rank(request, RankSite(torch.device(device))))[-1].runner)

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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("block_size", [8, 16, 64, 128])
def test_a_fork_goes_its_own_way(block_size, device, make_driver, greedy):
    """Two sequences from one: the second with a copy of the partial block and another newest token."""
    driver = make_driver(device, block_size=block_size, max_num_batched_tokens=256)
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


@pytest.mark.parametrize("device", DEVICES)
def test_a_token_that_was_sampled_is_amended_before_it_is_computed(device, make_driver, greedy):
    driver = make_driver(device)
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


SWAP_SPACE = 1 << 20  # of blocks of 8 * 2 * 2 * 32 float32: 128


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("block_size", [8, 64, 128])
def test_a_sequence_goes_on_from_blocks_that_were_away(block_size, device, make_driver, greedy):
    driver = make_driver(device, block_size=block_size, max_num_batched_tokens=256, swap_space_bytes=64 << 20)
    prompt = (PROMPT * 20)[: block_size + 3]
    found = driver.step(joins=[join(0, prompt, [4, 2], len(prompt))], chunks=[(0, len(prompt))])
    found += driver.step(decode=[0])
    known = [*prompt, *found]
    result = driver.start(leave=[0], decode=[], saves=[(4, 9), (2, 5)]).wait()
    assert (result.token_ids, result.finished_transfers) == (b"", 3)
    # Another takes the blocks, and the slot.
    other = [*prompt[:-1], 99]
    taking = {"joins": [join(0, other, [2, 4], len(other))], "chunks": [(0, len(other))], "finished_transfers": 3}
    assert driver.step(**taking) == greedy(other, 1)
    result = driver.start(loads=[(5, 7), (9, 0)], leave=[0], finished_transfers=3).wait()
    assert result.finished_transfers == 5
    back = join(1, known, [0, 7], len(prompt), len(known) - 1)
    found += driver.step(joins=[back], decode=[1], finished_transfers=5)
    found += driver.step() + driver.step()
    assert found == greedy(prompt, 5)


@pytest.mark.parametrize("device", DEVICES)
def test_a_prefix_that_was_away_is_shared(device, make_driver, greedy):
    driver = make_driver(device, swap_space_bytes=SWAP_SPACE)
    prompt = (PROMPT * 3)[:30]
    driver.step(joins=[join(0, prompt, range(4), 30)], chunks=[(0, 30)])
    driver.step(leave=[0], saves=[(0, 3), (1, 1), (2, 2)])
    driver.step(loads=[(3, 30), (1, 31), (2, 32)], finished_transfers=2)
    prompts = [[*prompt[:24], *tail] for tail in ([1, 2, 3], [4, 5], prompt[24:])]
    joins = [join(i, tokens, [30, 31, 32, 40 + i], len(tokens), 24) for i, tokens in enumerate(prompts)]
    chunks = [(i, len(tokens) - 24) for i, tokens in enumerate(prompts)]
    found = [driver.step(joins=joins, chunks=chunks, finished_transfers=3), driver.step(decode=[0, 1, 2])]
    assert list(map(list, zip(*found, strict=True))) == [greedy(tokens, 2) for tokens in prompts]


@pytest.mark.parametrize("device", DEVICES)
def test_transfers_beside_running_decodes_change_nothing(device, make_driver, greedy):
    driver = make_driver(device, swap_space_bytes=SWAP_SPACE)
    pending = [driver.start(joins=[join(0, PROMPT, [0, 1, 2])], chunks=[(0, len(PROMPT))])]
    pending.append(driver.start(decode=[0], saves=[(0, 0)]))
    pending.append(driver.start(saves=[(50, 1)], loads=[(0, 51)]))
    pending += [driver.start(finished_transfers=2), driver.start(loads=[(1, 52)])]
    results = [step.wait() for step in pending]
    assert [token for result in results for token in tokens(result)] == greedy(PROMPT, 5)
    assert results[-1].finished_transfers == 5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_decode_graphs_run_on_while_a_gib_is_moved(make_driver, greedy):
    num_blocks = 1 << 18  # of 4 KiB
    driver = make_driver("cuda:0", num_blocks_override=num_blocks + 64, swap_space_bytes=1 << 30)
    found = driver.step(joins=[join(0, PROMPT, range(num_blocks, num_blocks + 8))], chunks=[(0, len(PROMPT))])
    found += driver.step(decode=[0])
    everything = [(block_id, block_id) for block_id in range(num_blocks)]
    results = [driver.start(saves=everything).wait()]
    assert results[0].finished_transfers == 0, "the step took as long as the transfers"
    results += [step.wait() for step in [driver.start() for _ in range(20)]]
    results.append(driver.start(loads=everything, leave=[0], decode=[], finished_transfers=3).wait())
    assert results[-1].finished_transfers == driver.step_id
    assert found + [token for result in results for token in tokens(result)] == greedy(PROMPT, 23)


def test_transfers_without_a_host_tier_are_refused(make_driver):
    driver = make_driver()
    for changes in ({"saves": [(0, 0)]}, {"loads": [(0, 0)]}):
        with pytest.raises(FailedPreconditionError, match="where this rank has none"):
            driver.step(**changes)


def test_swap_space_over_the_free_memory_is_refused_before_the_model_is_looked_at(make_driver):
    with pytest.raises(ResourceExhaustedError, match=r"takes 1,073,741,824\.0 MiB for each of 1 .* lower --swap-space"):
        make_driver(swap_space_bytes=1 << 50, model_path="/nowhere")
