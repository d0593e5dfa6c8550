"""What a CPU does otherwise than the reference, for speed: kernels of numba, and where those are not for it, matrix
products with weights that oneDNN has packed.

Measured on 2 cores, all products of a step of 64 decodes of a 6.5 M-parameter model in float32: 7.6 ms with weights as
they are stored, which MKL packs anew in each call, and 4.5 ms with packed ones.
"""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)

from . import cpu_linear, reference
from .batch import AttentionBatch
from .cpu_attention import attend, rope_and_cache
from .cpu_launch import LIKE, KernelThreads
from .cpu_pointwise import add_rms_norm, rms_norm, silu_and_mul
from .ops import Operations

Tensor = torch.Tensor


def pack_weight(weight: torch.Tensor) -> torch.Tensor:
    """`weight` in oneDNN's own layout, which only `linear` reads; as it is where this oneDNN has no such product."""
    if not _packs(weight.dtype):
        return weight
    with torch.inference_mode():
        packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
    return packed


def _packs(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def padded_size(num_tokens: int) -> int:
    """The least of sixteen sizes in each octave that holds the tokens.

    OneDNN generates code for every new size of a product (some 2 ms for each), so it is to see few of them.
    """
    granule = 1 << max(0, num_tokens.bit_length() - 5)
    return -(-num_tokens // granule) * granule


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """As kernels.reference.linear, for a weight that `pack_weight` gave, and for any other."""
    if not weight.is_mkldnn:
        return reference.linear(x, weight, bias)
    num_tokens = x.shape[0]
    if (num_rows := padded_size(num_tokens)) != num_tokens:
        x = F.pad(x, (0, 0, 0, num_rows - num_tokens))
    # The last three: an operation on the result and its arguments; none.
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product[:num_tokens]


class CpuOperations(Operations):
    """Products with packed weights, and kernels of numba between them for float32 and bfloat16; other dtypes are left
    to the reference."""

    packs_weights = True

    def __init__(self) -> None:
        self._threads = KernelThreads()

    def pack_weight(self, weight: Tensor) -> Tensor:
        return cpu_linear.pack(weight) if cpu_linear.takes(weight) else pack_weight(weight)

    def unpack_weight(self, packed: Tensor) -> Tensor:
        if packed.dim() == 3:
            return cpu_linear.unpack(packed)
        return packed.to_dense() if packed.is_mkldnn else packed

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
        del out  # products with packed weights make their own
        if weight.dim() == 3:
            return cpu_linear.linear(self._threads, x, weight, bias)
        return linear(x, weight, bias)

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        if gate_up.dtype not in LIKE:
            return super().silu_and_mul(gate_up)
        return silu_and_mul(self._threads, gate_up)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if x.dtype not in LIKE:
            return super().rms_norm(x, weight, eps)
        return rms_norm(self._threads, x, weight, eps)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, other: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if x.dtype not in LIKE or other is not None:
            return super().add_rms_norm(x, residual, weight, eps, other)
        return add_rms_norm(self._threads, x, residual, weight, eps)

    def rope_and_cache(
        self,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        kv_indices: Tensor,
        num_heads: int,
        scales: Tensor | None = None,
    ) -> Tensor:
        assert scales is None, "a rank on a CPU refuses a cache in FP8"
        if qkv.dtype not in LIKE:
            return super().rope_and_cache(qkv, cos, sin, k_cache, v_cache, kv_indices, num_heads)
        return rope_and_cache(self._threads, qkv, (cos, sin), (k_cache, v_cache), kv_indices, num_heads)

    def plan_attention(self, batch: AttentionBatch, block_size: int, dtype: torch.dtype) -> Any:  # noqa: ANN401
        return batch if dtype in LIKE else super().plan_attention(batch, block_size, dtype)

    def attend(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        plan: Any,  # noqa: ANN401
        scale: float,
        scales: Tensor | None = None,
    ) -> Tensor:
        assert scales is None, "a rank on a CPU refuses a cache in FP8"
        if q.dtype not in LIKE:
            return super().attend(q, k_cache, v_cache, plan, scale)
        return attend(self._threads, q, (k_cache, v_cache), plan, scale)
