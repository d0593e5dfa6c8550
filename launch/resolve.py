"""Answers that the options leave to the model and the machine, checked before anything starts.

Imports neither torch nor ray: a bad model is refused in milliseconds.
"""

import socket
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError, FailedPreconditionError, InvalidArgumentError, NotFoundError, UnavailableError
from ..workers.checkpoint import verify_checkpoint
from ..workers.model_config import ModelConfig
from .config import DEFAULT_MODEL, ServeConfig

_CUDA_BLOCK_SIZES = (8, 16, 32, 64, 128)
_NUM_BATCHED_TOKENS = {"cuda": 8192, "cpu": 2048}
_CONNECT_TIMEOUT_S = 5.0
_DOWNLOADED = ["*.json", "*.safetensors", "*.jinja"]


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model that passed the checks."""

    path: Path
    names: tuple[str, ...]  # that requests may use; the first is the one shown
    config: ModelConfig
    max_model_len: int  # prompt and output, in tokens

    @property
    def description(self) -> str:
        """A line for people."""
        config = self.config
        shape = f"{config.num_layers} layers, {config.num_heads}/{config.num_kv_heads} heads"
        return f"{self.names[0]}: {config.architecture}, {shape}, context {self.max_model_len}"


@dataclass(frozen=True, slots=True)
class Placement:
    """What depends on where the ranks run."""

    device: str  # "cuda" or "cpu"
    dtype: str
    max_num_batched_tokens: int


def resolve_model(config: ServeConfig) -> ServedModel:
    """Finds and checks the model. Raises NotFoundError, CheckpointError or InvalidArgumentError, in one line."""
    path = find_model(config.model)
    model_config = ModelConfig.from_directory(path)
    if config.load_format != "dummy":
        verify_checkpoint(path, model_config)
    model_config.validate_tensor_parallel(config.tensor_parallel_size)
    if not config.skip_tokenizer_init and not (path / "tokenizer.json").is_file():
        raise NotFoundError(f"{path} has no tokenizer.json; save the tokenizer there, or pass --skip-tokenizer-init")
    names = config.served_model_name or (_default_name(config.model, path),)
    return ServedModel(path, names, model_config, _max_model_len(config, model_config))


def _default_name(model: str, path: Path) -> str:
    return path.name if Path(model).is_dir() else model


def _max_model_len(config: ServeConfig, model: ModelConfig) -> int:
    """The asked length, or the model's own; with linear and dynamic rope scaling that is the scaled one."""
    scaled = model.rope.rope_type in ("linear", "dynamic")
    limit = int(model.max_position_embeddings * model.rope.factor) if scaled else model.max_position_embeddings
    if config.max_model_len is None:
        return limit
    if config.max_model_len > limit:
        raise InvalidArgumentError(
            f"max_model_len {config.max_model_len} is over the model's context of {limit} tokens; lower it",
            "max_model_len",
        )
    return config.max_model_len


def find_model(model: str) -> Path:
    """The directory of `model`: itself, or a repository of the Hugging Face cache, downloaded if it is not there yet.

    Raises NotFoundError, in one line.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path.resolve()
    if model == str(DEFAULT_MODEL):
        raise NotFoundError(f"the demo model is not at {DEFAULT_MODEL}; run from a checkout of Octavo, or name a model")
    if path.exists():
        raise CheckpointError(f"model {model} is a file; give its directory, with config.json and safetensors")
    if not _may_be_repository(model):
        raise NotFoundError(f"model directory {model} does not exist; give a Hugging Face model directory")
    return _fetch(model)


def _may_be_repository(model: str) -> bool:
    owner, _, name = model.partition("/")
    return bool(owner and name) and "/" not in name and owner[0] not in "./~"


def _fetch(repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, local_files_only=True, allow_patterns=_DOWNLOADED))
    except LocalEntryNotFoundError:
        return _download(repository)
    except HFValidationError as error:
        raise NotFoundError(f"model {repository} is neither a directory nor a Hugging Face repository id") from error


def _download(repository: str) -> Path:
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, allow_patterns=_DOWNLOADED))
    except (LocalEntryNotFoundError, HfHubHTTPError, httpx.HTTPError, OSError) as error:
        raise NotFoundError(
            f"model {repository} is not a directory, not in the Hugging Face cache, and could not be downloaded "
            f"({type(error).__name__}); check the name, the network and HF_TOKEN, or give a directory"
        ) from error


def resolve_placement(config: ServeConfig, model: ModelConfig, num_free_gpus: int) -> Placement:
    """Chooses the device and what hangs on it. Raises FailedPreconditionError when `cuda` is asked and GPUs lack."""
    num_ranks = config.num_groups * config.tensor_parallel_size
    device = config.device
    if device == "auto":
        device = "cuda" if num_free_gpus >= num_ranks else "cpu"
    if device == "cuda" and num_free_gpus < num_ranks:
        raise FailedPreconditionError(
            f"{num_ranks} rank(s) need a GPU each, and Ray has {num_free_gpus} free; lower --tensor-parallel-size or "
            "--num-groups, or pass --device cpu"
        )
    if device == "cpu" and config.kv_cache_dtype == "fp8":
        raise InvalidArgumentError(
            "kv_cache_dtype fp8 is served on GPUs only, and device is cpu; drop --kv-cache-dtype, or serve on GPUs",
            "kv_cache_dtype",
        )
    if device == "cuda" and config.block_size not in _CUDA_BLOCK_SIZES:
        sizes = ", ".join(map(str, _CUDA_BLOCK_SIZES))
        raise InvalidArgumentError(
            f"block_size {config.block_size} is not served on GPUs; use one of {sizes}", "block_size"
        )
    dtype = config.dtype
    if dtype == "auto":
        dtype = model.dtype if device == "cuda" else "float32"  # type: ignore[assignment] # checked by ModelConfig
    num_batched_tokens = config.max_num_batched_tokens or max(_NUM_BATCHED_TOKENS[device], config.max_num_seqs)
    return Placement(device, dtype, num_batched_tokens)


def num_spare_ranks(config: ServeConfig, device: str) -> int:
    """Processes kept ready on each node of a rank."""
    return int(device == "cuda") if config.num_spare_ranks is None else config.num_spare_ranks


def check_ray_address(address: str | None) -> None:
    """Raises InvalidArgumentError or UnavailableError if no cluster can be there; Ray itself would try for minutes."""
    if address is None or address == "auto":
        return
    host, separator, port = address.rpartition(":")
    if not (separator and host and port.isdigit()) or "/" in host:
        raise InvalidArgumentError(f"ray_address must be HOST:PORT or auto, got {address!r}", "ray_address")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise UnavailableError(
            f"no Ray cluster answers at {address}; check --ray-address, or leave it out to start a local one"
        ) from error


def check_ports(config: ServeConfig) -> None:
    """Raises FailedPreconditionError if a public port cannot be bound."""
    for option, port in (("--port", config.port), ("--grpc-port", config.grpc_port)):
        if port:
            _check_port(config.host, port, option)


def _check_port(host: str, port: int, option: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # Without SO_REUSEPORT, unlike the gateways: a port that another server shares is taken, too.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise FailedPreconditionError(
                f"cannot listen on {host}:{port}: {error.strerror or error}; choose another --host or {option}"
            ) from error
