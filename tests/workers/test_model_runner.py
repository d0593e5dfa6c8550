"""One rank's runner: plans in, tokens and logprobs out; the oracle is transformers."""

import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from octavo.errors import FailedPreconditionError
from octavo.proto import engine_pb2, sampling_pb2, worker_pb2
from octavo.workers.plan import BlockMoves, Join, Plan
from octavo.workers.rank import RankSite, build_rank
from transformers import AutoModelForCausalLM

NO_SLOTS = np.zeros(0, dtype=np.int64)
PROMPT = [5, 9, 100, 3, 77, 42, 8, 19, 64, 2, 31]


def make_plan(**fields) -> Plan:
    empty = dict.fromkeys(("leave_slots", "append_slots", "chunk_slots", "chunk_num_tokens"), NO_SLOTS)
    defaults = {"epoch": 1, "step_id": 1, "joins": (), "decode_slots": None}
    plan = defaults | empty | {"append_block_ids": np.zeros(0, np.int32)} | fields
    return Plan(**{name: slots(value) if isinstance(value, list) else value for name, value in plan.items()})


def slots(values) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def make_join(slot=0, token_ids=PROMPT, num_prompt=None, num_blocks=4, **sampling) -> Join:
    params = {"top_p": 1.0, "repetition_penalty": 1.0, "max_tokens": 8} | sampling
    return Join(
        slot=slot,
        token_ids=np.array(token_ids, dtype=np.int32),
        num_prompt_tokens=num_prompt or len(token_ids),
        num_computed_tokens=0,
        block_ids=np.arange(slot * num_blocks, (slot + 1) * num_blocks, dtype=np.int32),
        sampling_params=sampling_pb2.SamplingParams(**params),
    )


@pytest.fixture
def model_path(make_llama):
    return make_llama(eos_token_id=None)


@pytest.fixture
def runner(model_path):
    config = engine_pb2.WorkerConfig(
        model_path=str(model_path), load_format="safetensors", dtype="float32", block_size=8, max_model_len=64,
        max_num_seqs=4, max_num_batched_tokens=64, gpu_memory_utilization=0.9, num_blocks_override=16,
    )  # fmt: skip
    request = worker_pb2.ConfigureRequest(config=config, rank=0, tensor_parallel_size=1, epoch=1)
    return list(build_rank(request, RankSite(torch.device("cpu"))))[-1].runner


@pytest.fixture
def oracle(model_path):
    """oracle(token_ids) -> log probabilities [len(token_ids), vocab_size] of what follows each token."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()

    def log_probs(token_ids):
        with torch.inference_mode():
            return model(torch.tensor([token_ids])).logits[0].log_softmax(-1)

    return log_probs


def tokens(result) -> list[int]:
    return np.frombuffer(result.token_ids, "<i4").tolist()


def table_rows(table):
    """(token ids [n, columns], logprobs [n, columns], ranks [n]) of a LogprobTable."""
    ids = np.frombuffer(table.token_ids, "<i4").reshape(-1, table.num_columns)
    logprobs = np.frombuffer(table.logprobs, "<f4").reshape(-1, table.num_columns)
    return ids, logprobs, np.frombuffer(table.ranks, "<i4")


def check_row(table, index, token_id, expected, num_top):
    """One row says of `token_id` what the expected log probabilities [vocab_size] say."""
    ids, logprobs, ranks = table_rows(table)
    order = expected.argsort(descending=True)
    assert ids[index].tolist() == [token_id, *order[:num_top].tolist()]
    # Two float32 softmaxes over 128 tokens that add in different orders.
    np.testing.assert_allclose(logprobs[index], expected.numpy()[ids[index]], atol=2e-5)
    assert ranks[index] == order.tolist().index(token_id) + 1


def greedy(oracle, token_ids, num_tokens):
    known = list(token_ids)
    for _ in range(num_tokens):
        known.append(int(oracle(known)[-1].argmax()))
    return known[len(token_ids) :]


def test_steps_queued_ahead_of_their_results_feed_back_on_the_device(runner, oracle):
    pending = [runner.execute(make_plan(joins=(make_join(),), chunk_slots=[0], chunk_num_tokens=[len(PROMPT)]))]
    pending.append(runner.execute(make_plan(decode_slots=[0])))
    pending += [runner.execute(make_plan()) for _ in range(6)]
    assert [token for step in pending for token in tokens(step.wait())] == greedy(oracle, PROMPT, 8)


def test_who_joins_with_a_copy_of_its_last_block_computes_one_token(runner, oracle):
    """As a decode beside one that goes on, both with what the first has computed."""
    prompt = [*PROMPT, 12, 60, 7, 25, 90]  # two blocks
    first = runner.execute(make_plan(joins=(make_join(0, prompt),), chunk_slots=[0], chunk_num_tokens=[16]))
    joins = tuple(
        replace(make_join(slot, prompt), num_computed_tokens=15, block_ids=np.array([0, own], np.int32))
        for slot, own in ((1, 9), (2, 10))
    )
    copies = BlockMoves(np.array([1, 1], np.int32), np.array([9, 10], np.int32))
    results = [runner.execute(make_plan(joins=joins, copies=copies, decode_slots=[0, 1, 2]))]
    more = {"append_slots": [1, 2], "append_block_ids": np.array([11, 12], np.int32)}
    results.append(runner.execute(make_plan(**more)))
    expected = greedy(oracle, prompt, 3)
    assert tokens(first.wait()) == expected[:1]
    assert [tokens(result.wait()) for result in results] == [
        [expected[1], *expected[:1] * 2],
        [expected[2], *expected[1:2] * 2],
    ]


def test_chunks_beside_decodes_change_nothing(runner, oracle):
    other = [7, 7, 30, 11]
    first = runner.execute(make_plan(joins=(make_join(1, other),), chunk_slots=[1], chunk_num_tokens=[4]))
    results = [tokens(first.wait())]
    for size, extra in ((5, {"joins": (make_join(),), "decode_slots": [1]}), (1, {}), (5, {})):
        results.append(tokens(runner.execute(make_plan(chunk_slots=[0], chunk_num_tokens=[size], **extra)).wait()))
    results.append(tokens(runner.execute(make_plan(decode_slots=[1, 0])).wait()))
    expected_other, expected = greedy(oracle, other, 5), greedy(oracle, PROMPT, 2)
    assert results == [
        [expected_other[0]],
        [expected_other[1]],
        [expected_other[2]],
        [expected_other[3], expected[0]],
        [expected_other[4], expected[1]],
    ]


def test_a_sequence_that_was_preempted_goes_on_where_it_was(runner, oracle):
    expected = greedy(oracle, PROMPT, 5)
    resumed = make_join(2, PROMPT + expected[:3], num_prompt=len(PROMPT))
    plan = make_plan(joins=(resumed,), chunk_slots=[2], chunk_num_tokens=[len(PROMPT) + 3])
    assert tokens(runner.execute(plan).wait()) == [expected[3]]
    assert tokens(runner.execute(make_plan(decode_slots=[2])).wait()) == [expected[4]]


def test_a_slot_that_changed_hands_takes_the_new_sequence_s_parameters(runner, oracle):
    banned = greedy(oracle, PROMPT, 1)[0]
    bias = {
        "logit_bias_token_ids": np.array([banned], "<i4").tobytes(),
        "logit_bias_values": np.array([-100], "<f4").tobytes(),
    }
    whole = {"chunk_slots": [0], "chunk_num_tokens": [len(PROMPT)]}
    assert tokens(runner.execute(make_plan(joins=(make_join(),), **whole)).wait()) == [banned]
    result = runner.execute(make_plan(leave_slots=[0], joins=(make_join(**bias),), **whole)).wait()
    assert tokens(result) == [int(oracle(PROMPT)[-1].index_fill(0, torch.tensor(banned), -1e9).argmax())]


def test_logprobs_of_sampled_tokens(runner, oracle):
    joins = (make_join(0), make_join(1, num_logprobs=3), make_join(2, num_logprobs=0))
    plan = make_plan(joins=joins, chunk_slots=[0, 1, 2], chunk_num_tokens=[len(PROMPT)] * 3)
    results = [runner.execute(plan).wait(), runner.execute(make_plan(decode_slots=[2, 1, 0])).wait()]
    assert [(row.row, row.table.num_columns) for row in results[0].logprobs] == [(1, 4), (2, 1)]
    assert [(row.row, row.table.num_columns) for row in results[1].logprobs] == [(0, 1), (1, 4)]
    first = tokens(results[0])[1]
    check_row(results[0].logprobs[0].table, 0, first, oracle(PROMPT)[-1], 3)
    check_row(results[1].logprobs[1].table, 0, tokens(results[1])[1], oracle([*PROMPT, first])[-1], 3)


def test_prompt_logprobs_come_chunk_by_chunk(runner, oracle):
    join = make_join(0, num_prompt_logprobs=2)
    expected = oracle(PROMPT)
    results = [runner.execute(make_plan(joins=(join,), chunk_slots=[0], chunk_num_tokens=[6])).wait()]
    results.append(runner.execute(make_plan(chunk_slots=[0], chunk_num_tokens=[5])).wait())
    results.append(runner.execute(make_plan(decode_slots=[0])).wait())
    starts = [(chunk.chunk, chunk.start, len(chunk.table.ranks) // 4) for r in results for chunk in r.prompt_logprobs]
    assert starts == [(0, 1, 6), (0, 7, 4)]
    for result in results[:2]:
        chunk = result.prompt_logprobs[0]
        for row in range(len(chunk.table.ranks) // 4):
            position = chunk.start + row
            check_row(chunk.table, row, PROMPT[position], expected[position - 1], 2)


def test_a_step_without_rows_answers_nothing(runner):
    result = runner.execute(make_plan()).wait()
    assert (result.token_ids, list(result.logprobs)) == (b"", [])


def test_a_plan_that_does_not_fit_the_slot_table_is_refused(runner):
    with pytest.raises(FailedPreconditionError, match="free"):
        runner.execute(make_plan(decode_slots=[3]))


def test_a_result_says_how_long_the_device_waited_for_its_step(runner):
    first = runner.execute(make_plan(joins=(make_join(),), chunk_slots=[0], chunk_num_tokens=[len(PROMPT)])).wait()
    time.sleep(0.05)
    second = runner.execute(make_plan(decode_slots=[0])).wait()
    runner._clock._stopped -= 2 * 3600.0  # what 32 bits do not hold
    third = runner.execute(make_plan()).wait()
    assert min(first.model_time_us, second.model_time_us) > 0
    assert second.idle_us >= 50_000
    assert third.idle_us == 1_000_000
