"""A gateway's settings, read from its CONFIG.json (octavo.internal.v1.GatewayConfig as protobuf JSON) and checked."""

import math
from dataclasses import dataclass
from pathlib import Path

from google.protobuf import json_format

from ..errors import InvalidArgumentError, NotFoundError
from ..proto import gateway_pb2

MAX_MESSAGE_BYTES = 32 * 1024 * 1024  # of a request at either door: room for prompts of millions of tokens


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """GatewayConfig after the checks; see proto/gateway.proto for the fields."""

    engine_address: str
    host: str
    http_port: int
    grpc_port: int
    model_path: Path
    served_model_names: tuple[str, ...]
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    seed: int | None
    local_address: str
    skip_tokenizer_init: bool
    shutdown_timeout_s: float
    max_outage_s: float
    launcher_address: str


def load_config(path: Path) -> GatewaySettings:
    """Reads and checks the file.

    Raises: NotFoundError without the file; InvalidArgumentError for JSON that is no GatewayConfig or a wrong field.
    """
    try:
        text = path.read_text()
    except OSError as error:
        raise NotFoundError(f"cannot read the gateway's configuration {path}: {error.strerror}") from error
    config = gateway_pb2.GatewayConfig()
    try:
        json_format.Parse(text, config)
    except json_format.ParseError as error:
        reason = str(error).splitlines()[0]
        raise InvalidArgumentError(f"{path} is no GatewayConfig in protobuf JSON: {reason}") from error
    return check_config(config)


def check_config(config: gateway_pb2.GatewayConfig) -> GatewaySettings:
    """Raises InvalidArgumentError naming the first field that cannot be served."""
    _require(bool(config.engine_address), "engine_address", "must be set")
    _require(bool(config.served_model_names), "served_model_names", "needs at least one name")
    _require(config.max_model_len >= 2, "max_model_len", "must be at least 2: a prompt token and an output token")
    _require(config.vocab_size >= 1, "vocab_size", "must be at least 1")
    _require(max(config.http_port, config.grpc_port) <= 65535, "http_port, grpc_port", "must be at most 65535")
    doors = (config.http_port, config.grpc_port, config.local_address)
    _require(any(doors), "http_port, grpc_port, local_address", "one must be set, or nobody can reach the gateway")
    _require(bool(config.host) or not any(doors[:2]), "host", "must be set for the public doors")
    _require(bool(config.model_path) or config.skip_tokenizer_init, "model_path", "must be set")
    eos_in_range = all(0 <= token_id < config.vocab_size for token_id in config.eos_token_ids)
    _require(eos_in_range, "eos_token_ids", f"must be in [0, {config.vocab_size})")
    _require(0 <= config.shutdown_timeout_s < math.inf, "shutdown_timeout_s", "must be finite, and at least 0")
    _require(0 <= config.max_outage_s < math.inf, "max_outage_s", "must be finite, and at least 0")
    return GatewaySettings(
        engine_address=config.engine_address,
        host=config.host,
        http_port=config.http_port,
        grpc_port=config.grpc_port,
        model_path=Path(config.model_path),
        served_model_names=tuple(config.served_model_names),
        max_model_len=config.max_model_len,
        vocab_size=config.vocab_size,
        eos_token_ids=tuple(config.eos_token_ids),
        seed=config.seed if config.HasField("seed") else None,
        local_address=config.local_address,
        skip_tokenizer_init=config.skip_tokenizer_init,
        shutdown_timeout_s=config.shutdown_timeout_s,
        max_outage_s=config.max_outage_s,
        launcher_address=config.launcher_address,
    )


def _require(condition: bool, field: str, message: str) -> None:
    if not condition:
        raise InvalidArgumentError(f"GatewayConfig.{field}: {message}", field)
