"""Models from outside are served under the architecture's name of config.json."""

import json

import pytest
import torch
from octavo.errors import CheckpointError, InvalidArgumentError
from octavo.workers.model_loader import load_model
from octavo.workers.models.llama import LlamaForCausalLM
from octavo.workers.models.registry import model_class, register_model, registered_architectures
from octavo.workers.parallel import TensorParallel


class RenamedLlama(LlamaForCausalLM):
    """An architecture of another name."""


def test_a_registered_model_is_served(make_llama, tmp_path):
    config = json.loads((make_llama() / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["RenamedLlamaForCausalLM"]}))

    def load():
        return load_model(tmp_path, "dummy", torch.float32, TensorParallel(0, 1, torch.device("cpu")), 64, seed=0)[0]

    with pytest.raises(CheckpointError, match="RenamedLlamaForCausalLM is not served; served: LlamaForCausalLM"):
        load()
    register_model("RenamedLlamaForCausalLM", RenamedLlama)
    register_model("RenamedLlamaForCausalLM", RenamedLlama)
    assert {"LlamaForCausalLM", "RenamedLlamaForCausalLM"} <= set(registered_architectures())
    assert isinstance(load(), RenamedLlama)


def test_a_name_is_not_given_twice():
    with pytest.raises(InvalidArgumentError, match="LlamaForCausalLM is registered already, as LlamaForCausalLM"):
        register_model("LlamaForCausalLM", RenamedLlama)
    assert model_class("LlamaForCausalLM") is LlamaForCausalLM


def test_an_unknown_architecture_is_refused():
    with pytest.raises(CheckpointError, match="architecture NoSuchModel is not served"):
        model_class("NoSuchModel")
