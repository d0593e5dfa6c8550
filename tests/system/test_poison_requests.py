"""Requests whose forward pass fails each time end alone; the streams beside them have the tokens they have without."""

import asyncio
import json
import shutil
from functools import partial

import numpy as np
import pytest
from google.rpc import code_pb2
from octavo.coordinator.shell.engine import Engine
from octavo.launch.restart_policy import RestartPolicy
from octavo.proto import engine_pb2

POISON = 5
MAX_TOKENS = 24
# The others never sample that token.
WELL = {
    "logit_bias_token_ids": np.array([POISON], "<i4").tobytes(),
    "logit_bias_values": np.array([-100], "<f4").tobytes(),
}
KINDS = [{}, {"temperature": 1.0}, {"temperature": 0.9, "frequency_penalty": 0.5}, {"temperature": 1.0, "top_p": 0.8}]


def register_poisoned_model(ranks: tuple[int, ...]) -> None:
    """In a rank's process: a Llama that raises when it meets the token, on those ranks."""
    from octavo.workers.models.llama import LlamaForCausalLM
    from octavo.workers.models.registry import register_model

    class PoisonedLlama(LlamaForCausalLM):
        def forward(self, token_ids, *args, **kwargs):
            if self._tp.rank in ranks and (token_ids == POISON).any():
                raise ArithmeticError("a token that a test has no step compute")
            return super().forward(token_ids, *args, **kwargs)

    register_model("PoisonedLlamaForCausalLM", PoisonedLlama)


@pytest.fixture
def poisoned_model(make_llama, tmp_path):
    path = shutil.copytree(make_llama(eos_token_id=None), tmp_path / "poisoned")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"architectures": ["PoisonedLlamaForCausalLM"]}))
    return path


class Rebuilder:
    """What the launcher does of it: rebuilds the group when it fails, and gives it up by the launcher's own rule."""

    def __init__(self) -> None:
        self.failures: list[engine_pb2.GroupFailure] = []
        self._policy = RestartPolicy(max_restarts=3)

    async def run(self, engine: Engine, add_group) -> None:
        """Until the engine's requests have ended."""
        while engine.scheduler.unfinished_requests() or not self.failures:
            known = [failure.epoch for failure in self.failures]
            try:
                answer = await asyncio.wait_for(engine.await_failures(known), 0.2)
            except TimeoutError:
                continue
            self.failures += answer.failures
            if answer.failures[0].is_explained:
                self._policy.forgive()
            delay_s = self._policy.delay_s(0.0)
            assert delay_s is not None, "the group would be given up"
            await add_group()


@pytest.mark.parametrize("ranks", [(0,), (1,), (0, 1)])
def test_requests_whose_steps_fail_each_time_end_alone(
    poisoned_model, run_requests, engine_options, request_of, sampling_params, ranks
):
    options = engine_options(2, rebuilds_groups=True, prepare=partial(register_poisoned_model, ranks))
    generator = np.random.default_rng(7)
    prompts = [generator.integers(6, 128, length).tolist() for length in generator.integers(1, 80, 14)]

    def well():
        return [
            request_of(
                prompt, sampling_params(MAX_TOKENS, seed=i, **WELL, **KINDS[i % len(KINDS)]), num_samples=1 + i % 2
            )
            for i, prompt in enumerate(prompts)
        ]

    def poisons():
        """In the prompt that samples share; as what is sampled first, met by the decode that follows; by beams."""
        only_poison = WELL | {"logit_bias_values": np.array([100], "<f4").tobytes()}
        beams = engine_pb2.BeamSearch(num_beams=3, length_penalty=1.0, early_stopping=engine_pb2.EARLY_STOPPING_NEVER)
        return [
            request_of([8, POISON, 9], sampling_params(MAX_TOKENS, temperature=1.0), num_samples=3),
            request_of(prompts[3], sampling_params(MAX_TOKENS, **only_poison)),
            request_of([*prompts[4], POISON], sampling_params(MAX_TOKENS), num_samples=1, beam_search=beams),
        ]

    expected = run_requests(poisoned_model, options, well())
    rebuilder = Rebuilder()
    mixed = [*well()[:6], *poisons(), *well()[6:]]
    found = run_requests(poisoned_model, options, mixed, rebuilder.run, may_fail=True)
    assert found.outputs[:6] + found.outputs[9:] == expected.outputs
    assert found.outputs[6:9] == [[[], [], []], [[POISON]], [[]]]
    assert not any(found.failures[:6] + found.failures[9:])
    assert [sorted(failures) for failures in found.failures[6:9]] == [[0, 1, 2], [0], [0]]
    for failure in (failure for failures in found.failures[6:9] for failure in failures.values()):
        assert failure.code == code_pb2.INTERNAL
        assert "came to this request" in failure.message
    assert sum(failure.is_explained for failure in rebuilder.failures) == 3
    assert len(rebuilder.failures) <= 9
    print(f"{len(rebuilder.failures)} failures of the group")
