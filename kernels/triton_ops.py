"""The operations of a GPU: Triton kernels, put together as layers call them."""

from itertools import pairwise

import torch

from .activation import silu_and_mul
from .batch import AttentionBatch
from .chunk_attention import paged_chunk_attention
from .decode_attention import DecodeWorkspace, decode_workspace, paged_decode_attention
from .norm import add_rms_norm, rms_norm
from .ops import Operations
from .rope_cache import rope_and_cache

Tensor = torch.Tensor


class TritonAttentionPlan:
    """What the layers of one step share. The first layer makes the decodes' workspace: it knows the shapes."""

    def __init__(self, batch: AttentionBatch) -> None:
        self.batch = batch
        self.num_decodes = batch.num_decode_rows
        # Sliced here once: a slice costs the host 1 us, and layers are many.
        self.decodes = batch.slots[: self.num_decodes], batch.seq_lens[: self.num_decodes]
        behind = slice(self.num_decodes, None)
        self.chunks = batch.slots[behind], batch.seq_lens[behind], batch.query_starts[behind]
        chunk_starts = batch.host_query_starts[behind]
        self.max_query_len = max((end - start for start, end in pairwise(chunk_starts)), default=0)  # of the chunks
        self._workspace: DecodeWorkspace | None = None

    def workspace(self, q: torch.Tensor, k_cache: torch.Tensor) -> DecodeWorkspace:
        """For decodes of queries [num_decodes, num_heads, head_dim]."""
        if self._workspace is None:
            _, num_heads, head_dim = q.shape
            _, block_size, num_kv_heads, _ = k_cache.shape
            max_keys = self.batch.block_tables.shape[1] * block_size
            self._workspace = decode_workspace(
                self.num_decodes, num_heads, num_kv_heads, head_dim, q.dtype, max_keys, q.device
            )
        return self._workspace


class TritonOperations(Operations):
    """Triton kernels, and cuBLAS for matrix products."""

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        return silu_and_mul(gate_up)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rms_norm(x, weight, eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return add_rms_norm(x, residual, weight, eps)

    def rope_and_cache(
        self,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        kv_indices: Tensor,
        num_heads: int,
    ) -> Tensor:
        return rope_and_cache(qkv, cos, sin, k_cache, v_cache, kv_indices, num_heads)

    def plan_attention(self, batch: AttentionBatch, block_size: int, dtype: torch.dtype) -> TritonAttentionPlan:
        """Computes nothing: the kernels read the step's tensors."""
        del block_size, dtype
        return TritonAttentionPlan(batch)

    def attend(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, plan: TritonAttentionPlan, scale: float) -> Tensor:
        batch, num_decodes = plan.batch, plan.num_decodes
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if num_decodes:
            paged_decode_attention(
                q[:num_decodes],
                k_cache,
                v_cache,
                batch.block_tables,
                *plan.decodes,
                scale,
                plan.workspace(q[:num_decodes], k_cache),
                out[:num_decodes],
            )
        if plan.max_query_len:
            paged_chunk_attention(
                q,
                k_cache,
                v_cache,
                batch.block_tables,
                *plan.chunks,
                plan.max_query_len,
                scale,
                out,
            )
        return out
