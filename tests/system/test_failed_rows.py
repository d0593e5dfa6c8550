"""A request whose scores are no numbers ends alone: in its prompt, in a decode, as a sample, as a beam search."""

import shutil

import numpy as np
import pytest
import torch
from google.rpc import code_pb2
from octavo.proto import engine_pb2
from safetensors.torch import load_file, save_file

NAN_TOKEN = 5
MAX_TOKENS = 12
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]


@pytest.fixture
def nan_model(make_llama, tmp_path):
    """A model with a token whose embedding is NaN, and with it all that follows."""
    path = shutil.copytree(make_llama(eos_token_id=None), tmp_path / "nan")
    tensors = load_file(path / "model.safetensors")
    tensors["model.embed_tokens.weight"][NAN_TOKEN] = torch.nan
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def prompts():
    """A dozen that are well. None is a whole number of blocks, so that attention masks what lies behind."""
    generator = np.random.default_rng(4)
    lengths = generator.integers(20, 90, 12)
    return [generator.integers(6, 128, length + (length % 16 == 0)).tolist() for length in lengths]


@pytest.mark.parametrize("device", DEVICES)
def test_requests_without_a_score_fail_alone(
    nan_model, run_requests, engine_options, request_of, sampling_params, device
):
    """Few blocks and slots: what the failed ones leave is soon another's."""
    never_nan = {
        "logit_bias_token_ids": np.array([NAN_TOKEN], "<i4").tobytes(),
        "logit_bias_values": np.array([-100], "<f4").tobytes(),
    }
    only_nan = never_nan | {"logit_bias_values": np.array([100], "<f4").tobytes()}

    def well():
        kinds = [{}, never_nan, never_nan | {"temperature": 0.8, "top_p": 0.9}]
        return [request_of(p, sampling_params(MAX_TOKENS, **kinds[i % 3])) for i, p in enumerate(prompts())]

    def broken():
        spoiled = [[*prompt[:7], NAN_TOKEN, *prompt[7:]] for prompt in prompts()]
        beams = engine_pb2.BeamSearch(num_beams=2, length_penalty=1, early_stopping=engine_pb2.EARLY_STOPPING_HEURISTIC)
        return [
            request_of(spoiled[0], sampling_params(MAX_TOKENS)),
            request_of(spoiled[1], sampling_params(MAX_TOKENS, temperature=0.7, top_k=5, num_logprobs=2)),
            request_of(prompts()[2], sampling_params(MAX_TOKENS, **only_nan)),
            request_of(spoiled[3], sampling_params(MAX_TOKENS, temperature=1.0), num_samples=3),
            request_of(spoiled[4], sampling_params(MAX_TOKENS), num_samples=1, beam_search=beams),
        ]

    for tensor_parallel_size in (1, 2):
        if device == "cuda" and tensor_parallel_size > torch.cuda.device_count():
            continue
        options = engine_options(tensor_parallel_size, num_blocks=44, max_num_seqs=6, device=device)
        expected = run_requests(nan_model, options, well())
        mixed = [request for pair in zip(well()[:5], broken(), strict=True) for request in pair] + well()[5:]
        result = run_requests(nan_model, options, mixed, may_fail=True)
        assert result.outputs[0:10:2] + result.outputs[10:] == expected.outputs
        # One that samples the token itself has it, and fails in the decode that follows.
        assert result.outputs[1:10:2] == [[[]], [[]], [[NAN_TOKEN]], [[], [], []], [[]]]
        failures = result.failures[1:10:2]
        assert [sorted(of_one) for of_one in failures] == [[0], [0], [0], [0, 1, 2], [0]]
        assert not any(result.failures[0:10:2] + result.failures[10:])
        for failure in (failure for of_one in failures for failure in of_one.values()):
            assert failure.code == code_pb2.INTERNAL
            assert "not finite" in failure.message
