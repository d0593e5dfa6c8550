"""What config.json says, read and refused. Names and defaults are transformers'."""

import json

import pytest
from octavo.errors import CheckpointError, InvalidArgumentError, NotFoundError
from octavo.workers.model_config import ModelConfig
from octavo.workers.rope_config import RopeConfig

LLAMA_3_1_8B = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
    "max_position_embeddings": 131072, "mlp_bias": False, "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "tie_word_embeddings": False,
    "rope_scaling": {
        "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "torch_dtype": "bfloat16", "vocab_size": 128256,
}  # fmt: skip
LLAMA_2_7B = {
    "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 4096,
    "intermediate_size": 11008, "max_position_embeddings": 4096, "num_attention_heads": 32, "num_hidden_layers": 32,
    "rms_norm_eps": 1e-05, "rope_scaling": None, "torch_dtype": "float16", "vocab_size": 32000, "pretraining_tp": 1,
}  # fmt: skip


@pytest.fixture
def read(tmp_path):
    """read(config, generation_config) -> ModelConfig of a directory that holds them."""

    def make(config, generation_config=None) -> ModelConfig:
        text = config if isinstance(config, str) else json.dumps(config)
        (tmp_path / "config.json").write_text(text)
        if generation_config is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation_config))
        return ModelConfig.from_directory(tmp_path)

    return make


def test_llama_3_1(read):
    config = read(LLAMA_3_1_8B, {"eos_token_id": [128001, 7]})
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (32, 8, 128)
    assert config.eos_token_ids == (128001, 128008, 128009, 7)
    assert config.dtype == "bfloat16"
    assert config.rope == RopeConfig("llama3", 500000.0, 8192, factor=8.0)


def test_llama_2_has_a_kv_head_for_each_head_and_plain_rope(read):
    config = read(LLAMA_2_7B)
    assert config.num_kv_heads == 32
    assert config.rope == RopeConfig("default", 10000.0, 4096)
    assert (config.eos_token_ids, config.dtype) == ((2,), "float16")
    assert not config.tie_word_embeddings


def test_llama_3_2_is_tied_and_names_its_head_dim(read):
    config = read(LLAMA_3_1_8B | {"head_dim": 64, "hidden_size": 2048, "tie_word_embeddings": True})
    assert (config.head_dim, config.tie_word_embeddings) == (64, True)


def test_the_form_that_transformers_5_writes(read):
    new = {
        key: value for key, value in LLAMA_3_1_8B.items() if key not in ("rope_scaling", "rope_theta", "torch_dtype")
    }
    parameters = LLAMA_3_1_8B["rope_scaling"] | {"rope_theta": 500000.0}
    assert read(new | {"rope_parameters": parameters, "dtype": "bfloat16"}) == read(LLAMA_3_1_8B)


ROPES = {
    "old name of the type": ({"type": "linear", "factor": 4.0}, RopeConfig("linear", 10000.0, 4096, factor=4.0)),
    "dynamic": ({"rope_type": "dynamic", "factor": 2}, RopeConfig("dynamic", 10000.0, 4096, factor=2.0)),
    "yarn, factor from the contexts": (
        {"rope_type": "yarn", "original_max_position_embeddings": 1024},
        RopeConfig("yarn", 10000.0, 1024, factor=4.0),
    ),
    "yarn in full": (
        {
            "rope_type": "yarn", "factor": 16, "original_max_position_embeddings": 1024, "attention_factor": 1.1,
            "beta_fast": 8, "beta_slow": 2, "mscale": 1, "mscale_all_dim": 0.5, "truncate": False,
        },
        RopeConfig(
            "yarn", 10000.0, 1024, factor=16.0, attention_factor=1.1, beta_fast=8.0, beta_slow=2.0, mscale=1.0,
            mscale_all_dim=0.5, truncate=False,
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROPES)
def test_rope_scalings(name, read):
    fields, expected = ROPES[name]
    assert read(LLAMA_2_7B | {"rope_scaling": fields}).rope == expected


REFUSED = {
    "not JSON": ("{", "is not valid JSON"),
    "not an object": ("[]", "must hold a JSON object"),
    "another architecture": ({"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM is not served; served: Ll"),
    "no architecture": ({"architectures": None}, "(none named) is not served"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not served; only 'silu' is"),
    "quantized": ({"quantization_config": {"quant_method": "awq"}}, "quantization 'awq' is not served"),
    "no size": ({"hidden_size": None}, "config.json has no hidden_size"),
    "size of zero": ({"vocab_size": 0}, "vocab_size must be a positive integer, not 0"),
    "size that is no integer": ({"num_hidden_layers": 2.5}, "num_hidden_layers must be a positive integer"),
    "size that is a flag": ({"num_hidden_layers": True}, "num_hidden_layers must be a positive integer"),
    "kv heads": ({"num_key_value_heads": 5}, "num_attention_heads 32 is no multiple of num_key_value_heads 5"),
    "head_dim": ({"hidden_size": 4097}, "no head_dim, and hidden_size 4097 is no multiple of num_attention_heads 32"),
    "odd head_dim": ({"head_dim": 33}, "head_dim 33 is odd"),
    "eps": ({"rms_norm_eps": -1}, "rms_norm_eps must be a positive number"),
    "flag": ({"attention_bias": "yes"}, "attention_bias must be true or false, not 'yes'"),
    "eos": ({"eos_token_id": "</s>"}, "eos_token_id must be a token id or a list of them, not '</s>'"),
    "dtype": ({"torch_dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn' is not served"),
    "rope type": ({"rope_scaling": {"rope_type": "longrope"}}, "rope type 'longrope' is not served; served: default,"),
    "rope lacks a field": ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "needs low_freq_factor, high_freq"),
    "rope factor": ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope parameter factor must be positive, not 0"),
    "rope field of another kind": ({"rope_scaling": {"type": "linear", "factor": "x"}}, "is not a number"),
    "rope of another kind": ({"rope_scaling": "linear"}, "must be an object"),
    "rope bounds": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}},
        "low_freq_factor must be under high_freq_factor",
    ),
    "partial rotary": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not served"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_served_is_refused_by_name(name, read):
    change, cause = REFUSED[name]
    with pytest.raises(CheckpointError) as error:
        read(change if isinstance(change, str) else LLAMA_2_7B | change)
    assert cause in str(error.value)
    assert "config.json" in str(error.value) or name == "eos"


def test_directories_that_are_no_models(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no config\.json; it is not a Hugging Face model directory"):
        ModelConfig.from_directory(tmp_path)
    with pytest.raises(NotFoundError, match="does not exist"):
        ModelConfig.from_directory(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("num_kv_heads", "good", "bad"), [(8, (1, 2, 4, 8, 16, 32), (0, 3, 5, 64)), (6, (1, 2, 3, 6, 12, 24), (4, 8))]
)
def test_rank_counts_that_split_the_model(num_kv_heads, good, bad, read):
    heads = {"num_attention_heads": num_kv_heads * 4, "num_key_value_heads": num_kv_heads, "head_dim": 128}
    config = read(LLAMA_3_1_8B | heads | {"intermediate_size": 12288})
    for size in good:
        config.validate_tensor_parallel(size)
    for size in bad:
        with pytest.raises(
            InvalidArgumentError, match=f"tensor_parallel_size {size} does not split the model"
        ) as error:
            config.validate_tensor_parallel(size)
        assert error.value.field == "tensor_parallel_size"
