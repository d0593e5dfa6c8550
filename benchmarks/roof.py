"""The least time that hardware needs: for one decode step, for a prompt, for many requests.

max(bytes of the weights / bandwidth, their arithmetic / compute) + bytes of the KV cache / bandwidth + two all-reduces
a layer, each over the ranks together. The all-reduce is a latency target: it leaves out the bytes of large batches. And
the arithmetic of attention is left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ..proto import admin_pb2
from ..workers.model_config import ModelConfig
from .machine import gpu_names
from .presets import ModelSize

_BYTES_PER_ELEMENT = 2  # the roof is that of 16-bit weights and KV


@dataclass(frozen=True, slots=True)
class Hardware:
    """What one GPU reaches, measured with plain copies and matrix products, not taken from a data sheet."""

    name: str
    bytes_per_s: float
    flops_per_s: float  # bfloat16, dense, in bursts: an H100 at its power cap comes to 685e12 after a second
    all_reduce_s: float  # target for a small message


H200 = Hardware("H200", bytes_per_s=4.3e12, flops_per_s=790e12, all_reduce_s=5e-6)
H100 = Hardware("H100 80GB HBM3", bytes_per_s=3.0e12, flops_per_s=780e12, all_reduce_s=5e-6)
_KNOWN = (H200, H100)


def hardware_of(gpus: list[str]) -> Hardware | None:
    """The measured hardware, if every GPU, by its name, is of the same known kind."""
    for hardware in _KNOWN:
        if gpus and all(hardware.name in name for name in gpus):
            return hardware
    return None


@dataclass(frozen=True, slots=True)
class Roof:
    """Of a model on GPUs that work as one. All times in seconds."""

    size: ModelSize
    hardware: Hardware
    num_gpus: int

    @classmethod
    def of(cls, config: ModelConfig, status: admin_pb2.GetStatusResponse, num_gpus: int) -> "Roof | None":
        """Of a system that runs; None where it runs on a CPU, or the hardware's figures are not known."""
        devices = {rank.device for group in status.groups for rank in group.ranks}
        hardware = hardware_of(gpu_names()) if all(device.startswith("cuda") for device in devices) else None
        return None if hardware is None else cls(ModelSize.of(config), hardware, num_gpus)

    def decode_s(self, batch_size: int, context_len: int) -> float:
        """A step of `batch_size` sequences that each know `context_len` tokens."""
        return self._model_s(batch_size, batch_size) + self._cache_s(batch_size * context_len) + self._all_reduces_s

    def prefill_s(self, num_tokens: int) -> float:
        """The whole prompt in one step."""
        return self._model_s(num_tokens, 1) + self._all_reduces_s

    def requests_s(self, num_prompt_tokens: Sequence[int], num_cached: int, num_output_tokens: Sequence[int]) -> float:
        """Many requests, in steps so large that nothing but the arithmetic and the cache's bytes counts. For each, its
        prompt's tokens and those that it generates; `num_cached` of the prompts' need not be computed. What several
        read of one prefix counts for each."""
        # Prompts give the first tokens, and the last ones are not computed.
        num_decodes = [num_output - 1 for num_output in num_output_tokens]
        computed = sum(num_prompt_tokens) - num_cached + sum(num_decodes)
        attended = sum(
            num * num_prompt + num * (num + 1) // 2
            for num, num_prompt in zip(num_decodes, num_prompt_tokens, strict=True)
        )
        return self._arithmetic_s(computed, sum(num_output_tokens)) + self._cache_s(attended)

    def _model_s(self, num_tokens: int, num_samples: int) -> float:
        read_s = _BYTES_PER_ELEMENT * self.size.num_parameters_read / (self.num_gpus * self.hardware.bytes_per_s)
        return max(read_s, self._arithmetic_s(num_tokens, num_samples))

    def _arithmetic_s(self, num_tokens: int, num_samples: int) -> float:
        num_body_parameters = self.size.num_parameters_read - self.size.num_head_parameters
        num_products = num_tokens * num_body_parameters + num_samples * self.size.num_head_parameters
        return 2 * num_products / (self.num_gpus * self.hardware.flops_per_s)

    def _cache_s(self, num_keys: int) -> float:
        num_bytes = num_keys * self.size.kv_elements_per_token * _BYTES_PER_ELEMENT
        return num_bytes / (self.num_gpus * self.hardware.bytes_per_s)

    @property
    def _all_reduces_s(self) -> float:
        return 2 * self.size.num_layers * self.hardware.all_reduce_s if self.num_gpus > 1 else 0.0


def percent_of_roof(roof_s: float | None, duration_s: float) -> float | None:
    return None if roof_s is None else 100 * roof_s / duration_s
