"""A forward pass raises once, on one rank of two: all ranks join again with their weights, and no token is lost."""

import asyncio
import json
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from octavo.proto import engine_pb2

MAX_TOKENS = 40
KINDS = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.9, "repetition_penalty": 1.3, "frequency_penalty": 0.5},
    {"temperature": 1.0, "top_p": 0.8, "top_k": 30},
]


def register_faulty_model(fault: str) -> None:
    """In a rank's process: a Llama that raises on the rank whose number is in the file, and removes the file first."""
    from octavo.workers.models.llama import LlamaForCausalLM
    from octavo.workers.models.registry import register_model

    class FaultyLlama(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            path = Path(fault)
            if path.exists() and path.read_text() == str(self._tp.rank):
                path.unlink()
                raise ArithmeticError("a fault that a test injects")
            return super().forward(*args, **kwargs)

    register_model("FaultyLlamaForCausalLM", FaultyLlama)


@pytest.fixture
def faulty_model(make_llama, tmp_path):
    source = make_llama(eos_token_id=None)
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["FaultyLlamaForCausalLM"]}))
    return tmp_path


async def raise_on(rank, fault, engine, num_steps):
    """The failure of the group's epoch, once it has made so many steps."""
    epoch = engine.status().groups[0].epoch
    while engine.status().groups[0].steps.num_steps < num_steps:
        await asyncio.sleep(0.005)
    fault.write_text(str(rank))
    [failure] = (await engine.await_failures([])).failures
    assert failure.epoch == epoch
    return failure


@pytest.mark.parametrize("rank", [0, 1])
def test_a_step_that_raises_costs_time_and_no_token(
    faulty_model, run_requests, engine_options, request_of, sampling_params, tmp_path, rank
):
    fault = tmp_path / "fault"
    options = engine_options(2, rebuilds_groups=True, prepare=partial(register_faulty_model, str(fault)))
    generator = np.random.default_rng(3)
    prompts = [generator.integers(0, 128, length).tolist() for length in generator.integers(1, 80, 15)]

    def requests():
        return [
            request_of(prompt, sampling_params(MAX_TOKENS, seed=i, **KINDS[i % len(KINDS)]), num_samples=1 + i % 3)
            for i, prompt in enumerate(prompts)
        ]

    expected = run_requests(faulty_model, options, requests())
    durations = []

    async def fail_twice(engine, add_group):
        for num_steps in (10, 20):
            failure = await raise_on(rank, fault, engine, num_steps)
            assert failure.reason == f"rank {rank}: ArithmeticError; the worker's log has more"
            started = time.monotonic()
            await add_group()
            durations.append(time.monotonic() - started)

    found = run_requests(faulty_model, options, requests(), fail_twice)
    assert found.outputs == expected.outputs
    print(f"served again within {durations} s")
    assert max(durations) < 10


def test_beams_wait_as_one(faulty_model, run_requests, engine_options, request_of, sampling_params, tmp_path):
    fault = tmp_path / "fault"
    options = engine_options(2, rebuilds_groups=True, prepare=partial(register_faulty_model, str(fault)))

    def beams():
        search = engine_pb2.BeamSearch(num_beams=4, length_penalty=1.0, early_stopping=engine_pb2.EARLY_STOPPING_NEVER)
        prompts = [[i, 2 * i, 3 * i] for i in range(1, 4)]
        return [request_of(p, sampling_params(MAX_TOKENS), num_samples=2, beam_search=search) for p in prompts]

    expected = run_requests(faulty_model, options, beams())

    async def fail_once(engine, add_group):
        await raise_on(1, fault, engine, num_steps=12)
        await add_group()

    found = run_requests(faulty_model, options, beams(), fail_once)
    assert found.outputs == expected.outputs
    np.testing.assert_allclose(found.beam_scores, expected.beam_scores, atol=1e-5)
