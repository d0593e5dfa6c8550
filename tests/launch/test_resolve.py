"""What is refused before anything starts, and what the options leave to model and machine."""

import socket

import pytest
from octavo.errors import (
    CheckpointError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    UnavailableError,
)
from octavo.launch.config import ServeConfig
from octavo.launch.resolve import check_ports, check_ray_address, find_model, resolve_model, resolve_placement


def resolve(directory, **options):
    return resolve_model(ServeConfig(model=str(directory), **({"load_format": "dummy"} | options)))


def test_a_model_is_named_after_its_directory(write_model):
    model = resolve(write_model())
    assert model.names == ("tiny-llama",)
    assert model.max_model_len == 1024
    assert model.config.vocab_size == 128


def test_served_names_win(write_model):
    assert resolve(write_model(), served_model_name=("a", "b")).names == ("a", "b")


def test_max_model_len_is_at_most_the_models(write_model):
    directory = write_model()
    assert resolve(directory, max_model_len=100).max_model_len == 100
    with pytest.raises(InvalidArgumentError, match="1024") as refusal:
        resolve(directory, max_model_len=1025)
    assert refusal.value.field == "max_model_len"


def test_linear_rope_scaling_lengthens_the_context(write_model):
    assert resolve(write_model(rope_scaling={"rope_type": "linear", "factor": 4.0})).max_model_len == 4096


@pytest.mark.parametrize("size", [3, 16])
def test_tensor_parallel_must_divide_the_heads(write_model, size):
    with pytest.raises(InvalidArgumentError, match="sizes that do: 1, 2, 4, 8") as refusal:
        resolve(write_model(), tensor_parallel_size=size)
    assert refusal.value.field == "tensor_parallel_size"


def test_a_bin_only_checkpoint_is_refused(write_model):
    directory = write_model()
    (directory / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match="safetensors"):
        resolve(directory, load_format="auto")


def test_no_weights_are_refused(write_model):
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        resolve(write_model(), load_format="safetensors")


def test_another_architecture_is_refused(write_model):
    with pytest.raises(CheckpointError, match="MambaForCausalLM"):
        resolve(write_model(architectures=["MambaForCausalLM"]))


def test_a_tokenizer_is_needed_unless_skipped(write_model):
    directory = write_model()
    (directory / "tokenizer.json").unlink()
    with pytest.raises(NotFoundError, match="--skip-tokenizer-init"):
        resolve(directory)
    assert resolve(directory, skip_tokenizer_init=True).max_model_len == 1024


@pytest.mark.parametrize("model", ["nowhere", "/no/such/model", "./a/b", "~/a", "a/b/c"])
def test_a_missing_directory_is_said_so(model):
    with pytest.raises(NotFoundError, match="does not exist"):
        find_model(model)


def test_a_file_is_no_model(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        find_model(str(tmp_path / "model.safetensors"))


def place(directory, num_free_gpus, **options):
    config = ServeConfig(model=str(directory), load_format="dummy", **options)
    return resolve_placement(config, resolve_model(config).config, num_free_gpus)


def test_auto_takes_gpus_when_there_are_enough(write_model):
    directory = write_model()
    on_gpu = place(directory, 2, tensor_parallel_size=2)
    assert (on_gpu.device, on_gpu.dtype, on_gpu.max_num_batched_tokens) == ("cuda", "bfloat16", 8192)
    on_cpu = place(directory, 1, tensor_parallel_size=2)
    assert (on_cpu.device, on_cpu.dtype, on_cpu.max_num_batched_tokens) == ("cpu", "float32", 2048)


def test_gpus_take_the_block_sizes_that_their_kernels_do(write_model):
    directory = write_model()
    assert place(directory, 1, block_size=64).device == "cuda"
    assert place(directory, 0, block_size=24).device == "cpu"
    with pytest.raises(InvalidArgumentError, match="block_size 24 is not served on GPUs; use one of 8, 16, 32"):
        place(directory, 1, block_size=24)


def test_a_kv_cache_in_fp8_is_for_gpus(write_model):
    directory = write_model()
    assert place(directory, 1, kv_cache_dtype="fp8").device == "cuda"
    for device in ("auto", "cpu"):
        with pytest.raises(InvalidArgumentError, match=r"kv_cache_dtype fp8 .* device is cpu") as refusal:
            place(directory, 0, device=device, kv_cache_dtype="fp8")
        assert refusal.value.field == "kv_cache_dtype"
        assert "\n" not in str(refusal.value)


def test_what_is_asked_is_kept(write_model):
    placement = place(write_model(), 8, device="cpu", dtype="float16", max_num_batched_tokens=300)
    assert (placement.device, placement.dtype, placement.max_num_batched_tokens) == ("cpu", "float16", 300)


def test_a_step_has_room_for_every_sequence(write_model):
    assert place(write_model(), 0, max_num_seqs=5000).max_num_batched_tokens == 5000


def test_too_few_gpus_are_refused_with_the_remedy(write_model):
    with pytest.raises(FailedPreconditionError, match=r"4 rank.*3 free.*--tensor-parallel-size"):
        place(write_model(), 3, device="cuda", tensor_parallel_size=2, num_groups=2)


@pytest.mark.parametrize(("option", "shown"), [("port", "--port"), ("grpc_port", "--grpc-port")])
def test_a_port_in_use_is_refused(option, shown):
    with socket.socket() as taken:
        # As a gateway of another server would hold it.
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        config = ServeConfig(**({"port": 0, "grpc_port": 0} | {option: port}))
        with pytest.raises(FailedPreconditionError, match=f"{port}.*{shown}"):
            check_ports(config)


def test_no_port_is_not_checked():
    check_ports(ServeConfig(port=0, grpc_port=0, host="no.such.interface.invalid"))


def test_a_ray_cluster_that_is_not_there_is_refused_at_once():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening
        with pytest.raises(UnavailableError, match="--ray-address"):
            check_ray_address(f"127.0.0.1:{unused.getsockname()[1]}")


@pytest.mark.parametrize("address", ["head", "head:", ":6379", "ray://head:10001", "head:port"])
def test_a_malformed_ray_address_is_refused(address):
    with pytest.raises(InvalidArgumentError, match="HOST:PORT"):
        check_ray_address(address)


def test_no_ray_address_and_auto_need_no_check():
    check_ray_address(None)
    check_ray_address("auto")
