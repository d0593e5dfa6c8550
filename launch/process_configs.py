"""What each process is told, from the options: EngineConfig, GatewayConfig, AddGroupRequest."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ..proto import engine_pb2, gateway_pb2
from .config import ServeConfig
from .resolve import Placement, ServedModel

_GIB = 1024**3
# A coordinator is back within seconds. Where it is not, nobody is left waiting for much longer than a client would.
_MAX_OUTAGE_S = 60.0


class Endpoint(Protocol):
    """Where one rank listens."""

    @property
    def address(self) -> str: ...

    @property
    def device(self) -> str: ...

    @property
    def store_address(self) -> str: ...


def engine_config(
    config: ServeConfig, model: ServedModel, placement: Placement, address: str, rebuilds_groups: bool = False
) -> engine_pb2.EngineConfig:
    return engine_pb2.EngineConfig(
        address=address,
        model=model.names[0],
        vocab_size=model.config.vocab_size,
        max_model_len=model.max_model_len,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=placement.max_num_batched_tokens,
        max_num_waiting=config.max_num_waiting,
        num_inflight_steps=config.num_inflight_steps,
        itl_target_ms=config.itl_target_ms,
        enable_prefix_caching=config.enable_prefix_caching,
        step_timeout_s=config.step_timeout_s,
        rebuilds_groups=rebuilds_groups,
    )


@dataclass(frozen=True, slots=True)
class GatewayAddresses:
    """Of a gateway's own door, and of those whom it calls."""

    local: str
    engine: str
    launcher: str = ""  # who scales the server; empty: nobody


def gateway_config(
    config: ServeConfig, model: ServedModel, addresses: GatewayAddresses, keeps_coordinator: bool = False
) -> gateway_pb2.GatewayConfig:
    """`keeps_coordinator`: whether another follows one that dies."""
    gateway = gateway_pb2.GatewayConfig(
        engine_address=addresses.engine,
        host=config.host,
        http_port=config.port,
        grpc_port=config.grpc_port,
        model_path=str(model.path),
        served_model_names=model.names,
        max_model_len=model.max_model_len,
        vocab_size=model.config.vocab_size,
        eos_token_ids=model.config.eos_token_ids,
        local_address=addresses.local,
        skip_tokenizer_init=config.skip_tokenizer_init,
        shutdown_timeout_s=config.shutdown_timeout,
        max_outage_s=_MAX_OUTAGE_S if keeps_coordinator else 0.0,
        launcher_address=addresses.launcher,
    )
    if config.seed is not None:
        gateway.seed = config.seed
    return gateway


def add_group_request(
    group_id: int, config: ServeConfig, model: ServedModel, placement: Placement, ranks: Sequence[Endpoint]
) -> engine_pb2.AddGroupRequest:
    worker = engine_pb2.WorkerConfig(
        model_path=str(model.path),
        load_format="dummy" if config.load_format == "dummy" else "safetensors",
        dtype=placement.dtype,
        kv_cache_dtype=placement.dtype if config.kv_cache_dtype == "auto" else config.kv_cache_dtype,
        block_size=config.block_size,
        max_model_len=model.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=placement.max_num_batched_tokens,
        gpu_memory_utilization=config.gpu_memory_utilization,
        num_blocks_override=config.num_gpu_blocks_override or 0,
        store_address=ranks[0].store_address,
        seed=config.seed or 0,
        enforce_eager=config.enforce_eager,
        swap_space_bytes=int(config.swap_space * _GIB),
    )
    workers = [engine_pb2.WorkerEndpoint(address=rank.address, device=rank.device) for rank in ranks]
    return engine_pb2.AddGroupRequest(group_id=group_id, workers=workers, config=worker)
