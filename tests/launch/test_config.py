"""The options of a server: bounds, the YAML file, and which wins."""

import math
from dataclasses import fields

import pytest
from octavo.errors import InvalidArgumentError, NotFoundError
from octavo.launch.config import ServeConfig
from octavo.launch.config_file import read_config_file
from octavo.launch.serve_command import merge_options


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tensor_parallel_size", 0),
        ("num_groups", 0),
        ("num_gateways", -1),
        ("block_size", 0),
        ("max_num_seqs", 0),
        ("max_num_batched_tokens", 0),
        ("max_num_batched_tokens", 255),  # under max_num_seqs
        ("num_gpu_blocks_override", 0),
        ("max_num_waiting", 0),
        ("num_inflight_steps", 1),
        ("itl_target_ms", -1.0),
        ("itl_target_ms", math.inf),
        ("step_timeout_s", -1.0),
        ("step_timeout_s", math.nan),
        ("max_restarts", -1),
        ("num_spare_ranks", -1),
        ("max_model_len", 1),
        ("port", 65_536),
        ("grpc_port", -1),
        ("grpc_port", 8000),  # the default of port
        ("gpu_memory_utilization", 0.0),
        ("gpu_memory_utilization", 1.1),
        ("gpu_memory_utilization", math.nan),
        ("swap_space", -0.5),
        ("swap_space", math.nan),
        ("swap_space", math.inf),
        ("shutdown_timeout", -1.0),
        ("shutdown_timeout", math.nan),
        ("seed", -1),
        ("model", ""),
        ("served_model_name", ("a", "")),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(InvalidArgumentError, match=name) as refusal:
        ServeConfig(**{name: value})
    assert refusal.value.field == name


def test_no_ports_is_fine_and_equal_ports_are_not():
    assert ServeConfig(port=0, grpc_port=0).port == 0
    with pytest.raises(InvalidArgumentError):
        ServeConfig(port=9, grpc_port=9)


def test_bounds_of_autoscaling():
    assert ServeConfig(num_groups=2, min_num_groups=2, max_num_groups=2).max_num_groups == 2
    for options, reason in (
        ({"max_num_groups": 0}, r"max_num_groups must be in \[1, 1024\], got 0"),
        ({"min_num_groups": 2}, "min_num_groups .2. is for autoscaling; give max_num_groups too"),
        ({"min_num_groups": 3, "max_num_groups": 2}, "min_num_groups .3. must be at most max_num_groups .2."),
        ({"max_num_groups": 2, "num_groups": 3}, r"num_groups must be in .* = \[1, 2\], got 3"),
        ({"max_num_groups": 2, "min_num_groups": 2}, r"num_groups must be in .* = \[2, 2\], got 1"),
    ):
        with pytest.raises(InvalidArgumentError, match=reason):
            ServeConfig(**options)


def test_spare_ranks_are_for_ranks_that_come_back():
    assert ServeConfig(num_spare_ranks=0, max_restarts=0).num_spare_ranks == 0
    with pytest.raises(InvalidArgumentError, match="max_restarts is 0") as refusal:
        ServeConfig(num_spare_ranks=1, max_restarts=0)
    assert refusal.value.field == "num_spare_ranks"


def test_a_first_request_needs_the_tokenizer():
    with pytest.raises(InvalidArgumentError, match="tokenizer"):
        ServeConfig(first_request="hello", skip_tokenizer_init=True)


def test_the_file_holds_options_with_dashes_or_underscores(tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("model: /models/llama\nmax-num-seqs: 8\nblock_size: 32\nserved-model-name: [a, b]\nseed: null\n")
    config = merge_options(file, {})
    assert config == ServeConfig(model="/models/llama", max_num_seqs=8, block_size=32, served_model_name=("a", "b"))


def test_the_command_line_wins_over_the_file(tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("block-size: 32\nmax-num-seqs: 8\nskip-tokenizer-init: true\n")
    given = {"block_size": 8, "max_num_seqs": None, "served_model_name": (), "skip_tokenizer_init": False}
    assert merge_options(file, given) == ServeConfig(block_size=8, max_num_seqs=8)


def test_an_empty_file_is_the_defaults(tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("# nothing yet\n")
    assert merge_options(file, {}) == ServeConfig()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("blok-size: 8", "unknown option 'blok-size'"),
        ("config: other.yaml", "unknown option 'config'"),
        ("block-size: 8\nblock_size: 16", "'block_size' is there twice"),
        ("block-size: eight", "block-size must be an integer, got 'eight'"),
        ("block-size: true", "block-size must be an integer, got True"),
        ("seed: 1.5", "seed must be an integer or null"),
        ("skip-tokenizer-init: 1", "must be true or false"),
        ("device: tpu", "must be one of auto, cuda, cpu"),
        ("served-model-name: [1]", "must be a string or a list of strings"),
        ("- block-size", "must hold options"),
        ("block-size: [", "is not YAML"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(tmp_path, text, reason):
    file = tmp_path / "options.yaml"
    file.write_text(text)
    with pytest.raises(InvalidArgumentError) as refusal:
        read_config_file(file)
    assert reason in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_missing_file_is_said_so(tmp_path):
    with pytest.raises(NotFoundError, match="No such file"):
        read_config_file(tmp_path / "none.yaml")


def test_an_integer_is_a_number(tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("gpu-memory-utilization: 1\n")
    assert merge_options(file, {}).gpu_memory_utilization == 1


def test_what_is_kept_of_the_kv_cache(tmp_path):
    assert (ServeConfig().swap_space, ServeConfig().enable_prefix_caching) == (0, True)
    file = tmp_path / "options.yaml"
    file.write_text("swap-space: 2.5\nenable-prefix-caching: true\n")
    config = merge_options(file, {"enable_prefix_caching": False})
    assert (config.swap_space, config.enable_prefix_caching) == (2.5, False)


def test_every_option_has_vllms_name_where_vllm_has_one():
    vllm = {
        "model",
        "tensor_parallel_size",
        "dtype",
        "load_format",
        "block_size",
        "max_model_len",
        "max_num_seqs",
        "max_num_batched_tokens",
        "gpu_memory_utilization",
        "num_gpu_blocks_override",
        "swap_space",
        "enable_prefix_caching",
        "host",
        "port",
        "served_model_name",
        "seed",
        "skip_tokenizer_init",
    }
    assert vllm <= {spec.name for spec in fields(ServeConfig)}
