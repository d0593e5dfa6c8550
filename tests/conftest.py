"""What the tests run models on: tiny random Llamas, saved as transformers saves them, and the demo model's scripts."""

import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    # Without a GPU kernels run in Triton's interpreter, to be chosen before anything imports it.
    os.environ["TRITON_INTERPRET"] = "1"

if "PYTEST_XDIST_WORKER" in os.environ:
    # Beside other test processes, OpenMP's threads spin while they wait for a core that another process has.
    torch.set_num_threads(1)

_DEFAULTS = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    # Ten times Llama's own: logits lie apart by much more than float32 rounding, so greedy tokens do not hang on it.
    "initializer_range": 0.2,
}


def _save_llama(path: Path, overrides: dict[str, Any]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM  # takes seconds, and many tests do without

    config = LlamaConfig(**(_DEFAULTS | overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).float()
        for parameter in model.parameters():
            # Norms start at 1 and biases at 0; random ones show whether they are applied.
            if parameter.dim() == 1:
                parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(path)


@pytest.fixture(scope="session")
def make_llama(tmp_path_factory):
    """make_llama(**overrides of LlamaConfig) -> Path of a float32 checkpoint, the same one for the same overrides."""
    saved: dict[str, Path] = {}

    def make(**overrides) -> Path:
        key = json.dumps(overrides, sort_keys=True)
        if key not in saved:
            saved[key] = tmp_path_factory.mktemp("llama")
            _save_llama(saved[key], overrides)
        return saved[key]

    return make


def pytest_collection_modifyitems(items) -> None:
    """`make test` looks for these there only."""
    away = [item.nodeid for item in items if item.get_closest_marker("alone") and item.path.parent.name != "system"]
    assert not away, away


DEMO_MODEL = Path(__file__).parents[1] / "examples" / "demo_model"


@pytest.fixture(scope="session")
def script() -> Callable[[str], ModuleType]:
    """The demo model's scripts as modules: they import each other as they do when one of them is run."""

    def load(name: str) -> ModuleType:
        sys.path.insert(0, str(DEMO_MODEL))
        try:
            return importlib.import_module(name)
        finally:
            sys.path.remove(str(DEMO_MODEL))

    return load


@pytest.fixture(scope="session")
def demo_model_directory() -> Path:
    return DEMO_MODEL
