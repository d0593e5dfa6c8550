"""The least time that hardware needs for one decode step.

max(bytes of the weights / bandwidth, their arithmetic / compute) + bytes of the KV cache / bandwidth + two all-reduces
a layer, each over the ranks together. The all-reduce is a latency target: it leaves out the bytes of large batches.
"""

from dataclasses import dataclass

from .presets import ModelSize

_BYTES_PER_ELEMENT = 2  # the roof is that of 16-bit weights and KV


@dataclass(frozen=True, slots=True)
class Hardware:
    """What one GPU reaches, measured with plain copies and matrix products, not taken from a data sheet."""

    name: str
    bytes_per_s: float
    flops_per_s: float  # bfloat16, dense
    all_reduce_s: float  # target for a small message


H200 = Hardware("H200", bytes_per_s=4.3e12, flops_per_s=790e12, all_reduce_s=5e-6)
_KNOWN = (H200,)


def hardware_of(gpu_names: list[str]) -> Hardware | None:
    """The measured hardware, if every GPU is of the same known kind."""
    for hardware in _KNOWN:
        if gpu_names and all(hardware.name in name for name in gpu_names):
            return hardware
    return None


def decode_roof_s(size: ModelSize, hardware: Hardware, num_gpus: int, batch_size: int, context_len: int) -> float:
    """Seconds of a step of `batch_size` sequences that each know `context_len` tokens."""
    read_s = _BYTES_PER_ELEMENT * size.num_parameters_read / (num_gpus * hardware.bytes_per_s)
    compute_s = 2 * batch_size * size.num_parameters_read / (num_gpus * hardware.flops_per_s)
    kv_bytes = batch_size * context_len * size.kv_elements_per_token * _BYTES_PER_ELEMENT
    all_reduces_s = 2 * size.num_layers * hardware.all_reduce_s if num_gpus > 1 else 0.0
    return max(read_s, compute_s) + kv_bytes / (num_gpus * hardware.bytes_per_s) + all_reduces_s
