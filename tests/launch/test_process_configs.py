"""Every option reaches the process that it is for."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from octavo.gateway.config import check_config
from octavo.launch.config import ServeConfig
from octavo.launch.process_configs import GatewayAddresses, add_group_request, engine_config, gateway_config
from octavo.launch.resolve import resolve_model, resolve_placement

ADDRESSES = GatewayAddresses("unix:/g", "unix:/e")


@dataclass
class Rank:
    address: str
    device: str
    store_address: str


@pytest.fixture
def resolved(write_model):
    def resolve(**options):
        config = ServeConfig(model=str(write_model(eos_token_id=[5, 6])), load_format="dummy", **options)
        model = resolve_model(config)
        return config, model, resolve_placement(config, model.config, num_free_gpus=0)

    return resolve


def test_the_coordinators(resolved):
    options = {
        "block_size": 32,
        "max_model_len": 512,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 99,
        "max_num_waiting": 77,
        "num_inflight_steps": 3,
        "itl_target_ms": 7.5,
        "step_timeout_s": 2.5,
    }
    config, model, placement = resolved(served_model_name=("shown", "other"), **options)
    proto = engine_config(config, model, placement, "unix:/e")
    assert {name: getattr(proto, name) for name in options} == options
    assert (proto.model, proto.vocab_size, proto.address) == ("shown", 128, "unix:/e")


@pytest.mark.parametrize("rebuilds_groups", [True, False])
def test_whether_groups_are_rebuilt_follows_from_who_starts_it(resolved, rebuilds_groups):
    assert engine_config(*resolved(), "unix:/e", rebuilds_groups).rebuilds_groups is rebuilds_groups


@pytest.mark.parametrize("keeps_coordinator", [True, False])
def test_requests_wait_for_another_coordinator_only_where_one_follows(resolved, keeps_coordinator):
    config, model, _ = resolved()
    settings = check_config(gateway_config(config, model, ADDRESSES, keeps_coordinator))
    assert (settings.max_outage_s > 0) is keeps_coordinator


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
def test_whether_prefixes_are_cached_is_the_coordinators_to_know(resolved, enable_prefix_caching):
    config = engine_config(*resolved(enable_prefix_caching=enable_prefix_caching), "unix:/e")
    assert config.enable_prefix_caching is enable_prefix_caching


def test_the_gateways(resolved):
    config, model, _ = resolved(
        host="0.0.0.0", port=81, grpc_port=82, seed=4, served_model_name=("a", "b"), skip_tokenizer_init=True,
        shutdown_timeout=7.5,
    )  # fmt: skip
    settings = check_config(gateway_config(config, model, ADDRESSES))
    assert (settings.engine_address, settings.local_address) == ("unix:/e", "unix:/g")
    assert (settings.host, settings.http_port, settings.grpc_port, settings.seed) == ("0.0.0.0", 81, 82, 4)
    assert (settings.served_model_names, settings.skip_tokenizer_init) == (("a", "b"), True)
    assert (settings.max_model_len, settings.vocab_size, settings.eos_token_ids) == (1024, 128, (5, 6))
    assert settings.model_path == Path(config.model).resolve()
    assert settings.shutdown_timeout_s == 7.5
    assert settings.launcher_address == ""
    assert (
        check_config(gateway_config(config, model, replace(ADDRESSES, launcher="unix:/l"))).launcher_address
        == "unix:/l"
    )


def test_no_seed_is_drawn_by_the_gateway(resolved):
    config, model, _ = resolved()
    assert check_config(gateway_config(config, model, ADDRESSES)).seed is None


def test_a_groups(resolved):
    options = {"block_size": 8, "max_num_seqs": 4, "max_num_batched_tokens": 64, "gpu_memory_utilization": 0.5}
    config, model, placement = resolved(seed=9, swap_space=1.5, num_gpu_blocks_override=33, dtype="float16", **options)
    ranks = [Rank("h:1", "cpu", "h:9"), Rank("h:2", "cpu", "")]
    request = add_group_request(3, config, model, placement, ranks)
    assert request.group_id == 3
    assert [(worker.address, worker.device) for worker in request.workers] == [("h:1", "cpu"), ("h:2", "cpu")]
    assert {name: getattr(request.config, name) for name in options} == options
    worker = request.config
    assert (worker.store_address, worker.load_format, worker.dtype) == ("h:9", "dummy", "float16")
    assert worker.swap_space_bytes == 3 << 29
    assert worker.kv_cache_dtype == "float16"
    fp8 = replace(config, kv_cache_dtype="fp8")
    assert add_group_request(3, fp8, model, placement, ranks).config.kv_cache_dtype == "fp8"
    assert (worker.num_blocks_override, worker.seed, worker.max_model_len) == (33, 9, 1024)
