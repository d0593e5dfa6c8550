"""The options of a server, with vLLM's names where vLLM has them: one dataclass, from which the command line, the YAML
file and `LLM(...)` take names, types, defaults and help.

What only the machine or the model can answer ("auto", None) is resolved later, in launch/resolve.py.
"""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..errors import InvalidArgumentError

DEFAULT_MODEL = Path(__file__).resolve().parent.parent / "examples" / "demo_model" / "demo"
DEFAULT_GRPC_PORT = 50051

Device = Literal["auto", "cuda", "cpu"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
KVCacheDtype = Literal["auto", "fp8"]
LoadFormat = Literal["auto", "safetensors", "dummy"]


def _help(text: str, shown: str | None = None) -> dict[str, str | None]:
    """A field's metadata; `shown` describes a default that says little by itself."""
    return {"help": text, "shown": shown}


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """All options of `octavo serve`. Construction checks each by itself; raises InvalidArgumentError naming it."""

    model: str = field(
        default=str(DEFAULT_MODEL), metadata=_help("Hugging Face model directory or repository id.", "the demo model")
    )
    tensor_parallel_size: int = field(
        default=1, metadata=_help("Ranks that hold the model together, sharded by attention head.")
    )
    num_groups: int = field(default=1, metadata=_help("Worker groups; each holds the whole model."))
    min_num_groups: int = field(
        default=1, metadata=_help("Fewest worker groups that autoscaling leaves; see max_num_groups.")
    )
    max_num_groups: int | None = field(
        default=None,
        metadata=_help("Have the number of groups follow the load, from min_num_groups to so many.", "it does not"),
    )
    num_gateways: int = field(default=1, metadata=_help("Gateway processes that share the public ports."))
    device: Device = field(
        default="auto", metadata=_help("Where the ranks run; auto: GPUs if Ray has enough free ones, else the CPU.")
    )
    dtype: Dtype = field(
        default="auto",
        metadata=_help("Type of weights and activations; auto: the checkpoint's on GPUs, float32 on the CPU."),
    )
    kv_cache_dtype: KVCacheDtype = field(
        default="auto",
        metadata=_help("What keys and values are kept as; auto: as dtype; fp8: one byte each, on GPUs only."),
    )
    load_format: LoadFormat = field(
        default="auto", metadata=_help("safetensors (auto), or dummy: random weights of the model's shape.")
    )
    block_size: int = field(
        default=16, metadata=_help("Tokens in a block of the KV cache; on GPUs 8, 16, 32, 64 or 128.")
    )
    max_model_len: int | None = field(
        default=None, metadata=_help("Most tokens of a prompt and its output.", "the model's own")
    )
    max_num_seqs: int = field(default=256, metadata=_help("Most sequences of a group that run at once."))
    max_num_batched_tokens: int | None = field(
        default=None, metadata=_help("Most tokens of one step.", "8192 on GPUs, 2048 on the CPU")
    )
    gpu_memory_utilization: float = field(
        default=0.9, metadata=_help("Share of a device's memory that Octavo may use in all.")
    )
    num_gpu_blocks_override: int | None = field(
        default=None, metadata=_help("Blocks of the KV cache on each rank.", "as many as fit")
    )
    swap_space: float = field(
        default=0.0,
        metadata=_help(
            "GiB of host memory on each rank for KV blocks that leave the device: of preempted sequences, and of "
            "prefixes that are found again. 0: none.",
            "0",
        ),
    )
    enable_prefix_caching: bool = field(
        default=True,
        metadata=_help(
            "Have requests share the KV blocks of prefixes that were computed before.",
            "on; off for bench, where the same prompts come again",
        ),
    )
    max_num_waiting: int = field(
        default=8192, metadata=_help("Most requests that wait for a place in a batch; more are refused.")
    )
    num_inflight_steps: int = field(
        default=2,
        metadata=_help("Steps that are sent to the ranks ahead of their results; up to 2 more of short ones."),
    )
    itl_target_ms: float = field(
        default=10.0,
        metadata=_help(
            "Time between the tokens of running streams that prompts are cut into chunks for. A deep queue goes before "
            "it. 0: chunks as large as a step.",
            "10; 0 for LLM, bench latency and bench throughput",
        ),
    )
    step_timeout_s: float = field(
        default=5.0,
        metadata=_help(
            "Seconds after which a rank that does not answer, or a step, counts as hung; a step only if it takes 20 "
            "times what steps like it took. 0: never."
        ),
    )
    max_restarts: int = field(
        default=5,
        metadata=_help(
            "Failures of a group, the coordinator or a gateway within 10 minutes after which it comes back; one more, "
            "and it is given up. 0: any death ends the server."
        ),
    )
    num_spare_ranks: int | None = field(
        default=None,
        metadata=_help(
            "Processes kept ready on each node of a rank, for one that dies and for new groups; each holds some 0.5 "
            "GiB of host memory and no GPU.",
            "1 on GPUs, where processes take long to start; 0 on CPUs",
        ),
    )
    enforce_eager: bool = field(default=False, metadata=_help("Run without CUDA graphs, as a CPU does anyway."))
    host: str = field(default="127.0.0.1", metadata=_help("Interface of the public ports; 0.0.0.0 for all."))
    port: int = field(default=8000, metadata=_help("OpenAI-compatible HTTP port; 0 opens none."))
    grpc_port: int = field(default=DEFAULT_GRPC_PORT, metadata=_help("gRPC port; 0 opens none."))
    served_model_name: tuple[str, ...] = field(
        default=(), metadata=_help("Name that requests may use; repeat for several.", "from the model's path")
    )
    seed: int | None = field(
        default=None,
        metadata=_help("Seed of requests that name none, and of dummy weights.", "drawn; 0 for dummy weights"),
    )
    ray_address: str | None = field(
        default=None, metadata=_help("Ray cluster to join: HOST:PORT, or auto.", "starts a local one")
    )
    shutdown_timeout: float = field(
        default=30.0,
        metadata=_help("Seconds that running requests may go on after Ctrl-C or SIGTERM, while new ones are refused."),
    )
    skip_tokenizer_init: bool = field(default=False, metadata=_help("Serve token ids only; load no tokenizer."))
    first_request: str | None = field(
        default=None, metadata=_help("When ready, send this text over gRPC and show the answer.", "none")
    )

    def __post_init__(self) -> None:
        values = asdict(self)
        for name, (low, high) in _RANGES.items():
            _require_in_range(name, values[name], low, high)
        _require_ports(self.port, self.grpc_port)
        _require_bounds(self.num_groups, self.min_num_groups, self.max_num_groups)
        if not (math.isfinite(self.gpu_memory_utilization) and 0 < self.gpu_memory_utilization <= 1):
            raise _refusal("gpu_memory_utilization", f"must be in (0, 1], got {self.gpu_memory_utilization}")
        if not (math.isfinite(self.itl_target_ms) and self.itl_target_ms >= 0):
            raise _refusal("itl_target_ms", f"must be 0 or more, got {self.itl_target_ms}")
        if not (math.isfinite(self.step_timeout_s) and self.step_timeout_s >= 0):
            raise _refusal("step_timeout_s", f"must be 0 or more, got {self.step_timeout_s}")
        if not (math.isfinite(self.shutdown_timeout) and self.shutdown_timeout >= 0):
            raise _refusal("shutdown_timeout", f"must be 0 or more seconds, got {self.shutdown_timeout}")
        if not 0 <= self.swap_space <= _MAX_SWAP_SPACE:
            raise _refusal("swap_space", f"must be in [0, {_MAX_SWAP_SPACE}] GiB, got {self.swap_space}")
        if self.max_num_batched_tokens is not None and self.max_num_batched_tokens < self.max_num_seqs:
            reason = f"must be at least max_num_seqs ({self.max_num_seqs}), got {self.max_num_batched_tokens}"
            raise _refusal("max_num_batched_tokens", reason)
        if self.num_spare_ranks and not self.max_restarts:
            raise _refusal("num_spare_ranks", "are for ranks that come back, and max_restarts is 0; leave one out")
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise _refusal("seed", f"must be in [0, 2^64), got {self.seed}")
        if not self.model or not all(self.served_model_name):
            raise _refusal("model" if not self.model else "served_model_name", "must not be empty")
        if self.first_request is not None and self.skip_tokenizer_init:
            raise _refusal("first_request", "is text and needs the tokenizer; drop skip_tokenizer_init or this one")


# What suits those who want all outputs soon, and watch no token come: `LLM`, and benchmarks of steps and throughput.
OFFLINE_DEFAULTS: dict[str, Any] = {"itl_target_ms": 0.0}

_MAX_UINT16 = 65_535
_MAX_INT32 = 2**31 - 1
_MAX_SWAP_SPACE = 1 << 20  # GiB
# The upper ends are what the protocol can say, or far beyond what is of use.
_RANGES: dict[str, tuple[int, int]] = {
    "tensor_parallel_size": (1, 1024),
    "num_groups": (1, 1024),
    "min_num_groups": (1, 1024),
    "max_num_groups": (1, 1024),
    "num_gateways": (1, 1024),
    "block_size": (1, _MAX_UINT16),
    "max_model_len": (2, _MAX_INT32),
    "max_num_seqs": (1, _MAX_UINT16 + 1),  # a slot is a uint16
    "max_num_batched_tokens": (1, _MAX_INT32),
    "num_gpu_blocks_override": (1, _MAX_INT32),
    "max_num_waiting": (1, _MAX_INT32),
    "num_inflight_steps": (2, 1024),
    "max_restarts": (0, _MAX_INT32),
    "num_spare_ranks": (0, 1024),
}


def _refusal(name: str, reason: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"{name} {reason}", name)


def _require_in_range(name: str, value: int | None, low: int, high: int) -> None:
    if value is not None and not low <= value <= high:
        raise _refusal(name, f"must be in [{low}, {high}], got {value}")


def _require_bounds(num_groups: int, least: int, most: int | None) -> None:
    if most is None:
        if least != 1:
            raise _refusal("min_num_groups", f"({least}) is for autoscaling; give max_num_groups too, or leave it out")
        return
    if least > most:
        raise _refusal("min_num_groups", f"({least}) must be at most max_num_groups ({most})")
    if not least <= num_groups <= most:
        raise _refusal(
            "num_groups", f"must be in [min_num_groups, max_num_groups] = [{least}, {most}], got {num_groups}"
        )


def _require_ports(port: int, grpc_port: int) -> None:
    for name, value in (("port", port), ("grpc_port", grpc_port)):
        if not 0 <= value <= _MAX_UINT16:
            raise _refusal(name, f"must be in [0, {_MAX_UINT16}], got {value}")
    if port and port == grpc_port:
        raise _refusal("grpc_port", f"must differ from port ({port})")
