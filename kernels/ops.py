"""The device operations that layers call, and the one place that chooses their implementation for a device.

`Operations` is the reference: each primitive as kernels/reference.py has it, and the fused operations put together from
primitives. An implementation overrides what it does otherwise.
"""

from typing import Any, ClassVar

import torch

from . import reference
from .batch import AttentionBatch

Tensor = torch.Tensor


class Operations:
    """Every operation of a step. Formulas and shapes are those of kernels/reference.py. Holds no state of a step."""

    packs_weights: ClassVar[bool] = False  # whether `pack_weight` gives another tensor than it takes

    def reads_prefixes_once(self, num_heads: int, num_kv_heads: int) -> bool:
        """Whether attention with so many heads on this rank heeds AttentionBatch.prefixes."""
        del num_heads, num_kv_heads
        return False

    def pack_weight(self, weight: Tensor) -> Tensor:
        """Of a loaded weight [out_size, in_size], once: what this implementation's products take. Here: as it is."""
        return weight

    def unpack_weight(self, packed: Tensor) -> Tensor:
        """The weight that `pack_weight` was given, contiguous."""
        return packed

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
        """x @ weight.T + bias: [num_tokens, in_size] to [num_tokens, out_size]. It lies in `out` if one is given and
        the product can be written there."""
        return reference.linear(x, weight, bias, out)

    def embed(self, token_ids: Tensor, table: Tensor, start: int, out: Tensor | None = None) -> Tensor:
        """Rows of a table of tokens [start, start + num_rows), zeros for others: [num_tokens] to [num_tokens, width].
        They lie in `out` if one is given and they can be written there."""
        del out
        return reference.embed(token_ids, table, start)

    def rope_rows(self, positions: Tensor, cos_table: Tensor, sin_table: Tensor) -> tuple[Tensor, Tensor]:
        """The tables' rows of the positions: [num_tokens] to [num_tokens, 1, head_dim] each."""
        return reference.rope_rows(positions, cos_table, sin_table)

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up: [num_tokens, 2 * n] to [num_tokens, n]."""
        return reference.silu_and_mul(gate_up)

    def gated_linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """silu(gate) * up of the product x @ weight.T + bias; the weight's rows are all gates, then all ups."""
        return self.silu_and_mul(self.linear(x, weight, bias))

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """[num_tokens, hidden_size] to the same."""
        return reference.rms_norm(x, weight, eps)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, other: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The norm of x + residual, and that sum; of x + other + residual, if x comes in two parts."""
        return reference.add_rms_norm(x, residual, weight, eps, other)

    def add_rms_norm_linear(
        self,
        x: Tensor,
        residual: Tensor,
        norm: tuple[Tensor, float],  # the norm's weight and epsilon
        weight: Tensor,
        bias: Tensor | None,
        gated: bool,
    ) -> tuple[Tensor, Tensor]:
        """The product of the norm of x + residual, gated or not, and that sum."""
        normed, total = self.add_rms_norm(x, residual, *norm)
        product = self.gated_linear if gated else self.linear
        return product(normed, weight, bias), total

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
        """Rotates queries and keys, caches keys and values, returns the queries [num_tokens, num_heads, head_dim]."""
        return reference.rope_and_cache(qkv, cos, sin, k_cache, v_cache, kv_indices, num_heads, scales)

    def plan_attention(self, batch: AttentionBatch, block_size: int, dtype: torch.dtype) -> Any:  # noqa: ANN401
        """What one step's layers share. Only the same implementation's `attend` and `attention` know what is in it."""
        return reference.plan_attention(batch, block_size, dtype)

    def attend(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        plan: Any,  # noqa: ANN401
        scale: float,
        scales: Tensor | None = None,
    ) -> Tensor:
        """Causal attention [num_tokens, num_heads, head_dim] over the cache, which has this step's tokens already."""
        return reference.attend(q, k_cache, v_cache, plan, scale, scales)

    def attention(
        self,
        qkv: Tensor,
        rope: tuple[Tensor, Tensor],  # cos and sin, [num_tokens, 1, head_dim] each
        # Of keys and of values, [num_blocks, block_size, num_kv_heads, head_dim] each; and in FP8 their scales.
        cache: tuple[Tensor, ...],
        kv_indices: Tensor,
        plan: Any,  # noqa: ANN401
        num_heads: int,
        scale: float,
        out: Tensor | None = None,
    ) -> Tensor:
        """All between the QKV product [num_tokens, all heads, head_dim] and the output projection: rotates, caches and
        attends. Returns [num_tokens, num_heads, head_dim]: in `out` if one is given and it can be written there."""
        del out
        k_cache, v_cache, *scales = cache
        q = self.rope_and_cache(qkv, *rope, k_cache, v_cache, kv_indices, num_heads, *scales)
        return self.attend(q, k_cache, v_cache, plan, scale, *scales)


def operations_for(device: torch.device) -> Operations:
    """The implementation for `device`: Triton kernels on a GPU, the torch reference and oneDNN on a CPU."""
    if device.type != "cuda":
        from .cpu import CpuOperations  # as below, a subclass

        return CpuOperations()
    from .triton_ops import TritonOperations  # Triton comes with a CUDA build of torch, and is needed with no other

    return TritonOperations(device)
