"""The transformers baselines do the work that they are asked for, whatever the model's end-of-sequence token."""

import json

import pytest
from octavo.benchmarks.baselines import load_model, run_continuous_batching, run_static_batch, save_random_model
from octavo.benchmarks.workload import LengthRange, Workload
from octavo.workers.checkpoint import verify_checkpoint
from octavo.workers.model_config import ModelConfig
from transformers import ContinuousBatchingConfig

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 4,
    "max_position_embeddings": 64,
    "eos_token_id": [0, 1],  # half the vocabulary: an early end would be seen
}
PROMPTS = Workload(3, LengthRange(2, 9), output_len=12).prompts(vocab_size=4)


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny")
    (directory / "config.json").write_text(json.dumps(TINY))
    save_random_model(directory, directory / "saved", seed=0, dtype="float32")
    return directory / "saved"


def test_saved_weights_are_a_checkpoint_that_octavo_loads(saved_model):
    verify_checkpoint(saved_model, ModelConfig.from_directory(saved_model))


def test_every_request_gets_all_its_tokens(saved_model):
    model = load_model(saved_model, "cpu", "float32")
    small = ContinuousBatchingConfig(page_size=16, num_blocks=16, max_batch_tokens=64)  # else it fills the memory
    runs = run_static_batch(model, PROMPTS, 12) + run_continuous_batching(model, PROMPTS, 12, small)
    assert [run.num_output_tokens for run in runs] == [[12, 12, 12]] * 3
    assert all(run.duration_s > 0 for run in runs)
