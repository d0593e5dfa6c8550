"""The operations of a GPU: Triton kernels, put together as layers call them, and cuBLAS for large matrix products."""

import logging
from collections.abc import Callable
from itertools import pairwise
from typing import TypeVar

import torch

from .activation import silu_and_mul
from .batch import AttentionBatch
from .chunk_attention import paged_chunk_attention
from .decode_attention import DecodeWorkspace, decode_workspace, paged_decode_attention
from .gathered_chunks import GatherPlan, attend_gathered, is_worth_gathering, plan_gather
from .gemv import MAX_NORM_SIZE, add_norm_gemv, gemv, gemv_silu_and_mul
from .linear_config import LinearKernel, linear_kernel
from .lookup import embed, rope_rows
from .norm import add_rms_norm, rms_norm
from .ops import Operations
from .rope_cache import rope_and_cache
from .small_matmul import SplitWorkspace, small_matmul, small_matmul_silu_and_mul

_log = logging.getLogger(__name__)

Tensor = torch.Tensor
T = TypeVar("T")
_RowInputs = tuple[Tensor, Tensor, Tensor]


class TritonAttentionPlan:
    """What the layers of one step share."""

    def __init__(self, batch: AttentionBatch) -> None:
        self.batch = batch
        self.num_decodes = batch.num_decode_rows
        # Sliced here once: a slice costs the host 1 us, and layers are many.
        self.decodes = batch.slots[: self.num_decodes], batch.seq_lens[: self.num_decodes]
        behind = slice(self.num_decodes, None)
        self.chunks = batch.slots[behind], batch.seq_lens[behind], batch.query_starts[behind]
        chunk_starts = batch.host_query_starts[behind]
        self.max_query_len = max((end - start for start, end in pairwise(chunk_starts)), default=0)  # of the chunks
        self._inputs: tuple[_RowInputs, _RowInputs] | None = None
        self._gather: GatherPlan | None = None
        self._has_gather = False  # whether _gather says what to do

    def split(self, rope: tuple[Tensor, Tensor], kv_indices: Tensor) -> tuple[_RowInputs, _RowInputs]:
        """Cos, sin and cells of the decodes, and of the chunks. The arguments are the same for all layers."""
        if self._inputs is None:
            cos, sin = rope
            n = self.num_decodes
            self._inputs = (cos[:n], sin[:n], kv_indices[:n]), (cos[n:], sin[n:], kv_indices[n:])
        return self._inputs

    def gather(self, q: Tensor, k_cache: Tensor) -> GatherPlan | None:
        """For the chunks' attention; None where it reads the cache through the block tables."""
        if not self._has_gather:
            _, block_size, _, head_dim = k_cache.shape
            if is_worth_gathering(self.batch, head_dim, q.dtype, k_cache.dtype != q.dtype):
                self._gather = plan_gather(self.batch, q.shape[1], block_size)
            self._has_gather = True
        return self._gather


class TritonOperations(Operations):
    """Triton kernels; what they refuse, the reference does, which the log says once."""

    def __init__(self, device: torch.device) -> None:
        """For one stream of `device`: launches share a workspace."""
        self._split_workspace = SplitWorkspace(device)
        self._decode_workspaces: dict[tuple[object, ...], DecodeWorkspace] = {}
        self._refusals: set[str] = set()

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
        match linear_kernel(len(x), weight):
            case LinearKernel.GEMV:
                return gemv(x, weight, bias)
            case LinearKernel.SMALL_MATMUL:
                return small_matmul(x, weight, bias, self._split_workspace)
        return super().linear(x, weight, bias, out)

    def gated_linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        match linear_kernel(len(x), weight):
            case LinearKernel.GEMV:
                return gemv_silu_and_mul(x, weight, bias)
            case LinearKernel.SMALL_MATMUL:
                return small_matmul_silu_and_mul(x, weight, bias, self._split_workspace)
        return super().gated_linear(x, weight, bias)

    def add_rms_norm_linear(
        self,
        x: Tensor,
        residual: Tensor,
        norm: tuple[Tensor, float],
        weight: Tensor,
        bias: Tensor | None,
        gated: bool,
    ) -> tuple[Tensor, Tensor]:
        if linear_kernel(len(x), weight) is LinearKernel.GEMV and x.shape[1] <= MAX_NORM_SIZE:
            return add_norm_gemv(x, residual, *norm, weight, bias, gated)
        return super().add_rms_norm_linear(x, residual, norm, weight, bias, gated)

    def embed(self, token_ids: Tensor, table: Tensor, start: int, out: Tensor | None = None) -> Tensor:
        return self._or_reference(embed, super().embed, token_ids, table, start, out)

    def rope_rows(self, positions: Tensor, cos_table: Tensor, sin_table: Tensor) -> tuple[Tensor, Tensor]:
        return self._or_reference(rope_rows, super().rope_rows, positions, cos_table, sin_table)

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        return self._or_reference(silu_and_mul, super().silu_and_mul, gate_up)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._or_reference(rms_norm, super().rms_norm, x, weight, eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return self._or_reference(add_rms_norm, super().add_rms_norm, x, residual, weight, eps)

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
        return rope_and_cache(qkv, cos, sin, k_cache, v_cache, kv_indices, num_heads, scales=scales)

    def plan_attention(self, batch: AttentionBatch, block_size: int, dtype: torch.dtype) -> TritonAttentionPlan:
        """Computes nothing: the kernels read the step's tensors."""
        del block_size, dtype
        return TritonAttentionPlan(batch)

    def attention(
        self,
        qkv: Tensor,
        rope: tuple[Tensor, Tensor],
        cache: tuple[Tensor, ...],
        kv_indices: Tensor,
        plan: TritonAttentionPlan,
        num_heads: int,
        scale: float,
    ) -> Tensor:
        if not plan.num_decodes:
            return super().attention(qkv, rope, cache, kv_indices, plan, num_heads, scale)
        decodes, chunks = plan.split(rope, kv_indices)
        num_tokens, _, head_dim = qkv.shape
        out = qkv.new_empty(num_tokens, num_heads, head_dim)
        k_cache, v_cache = cache[:2]
        scales = cache[2] if len(cache) > 2 else None
        workspace = self._decode_workspace(plan.batch.block_tables, num_heads, k_cache, qkv.dtype)
        n = plan.num_decodes
        rows = plan.batch.block_tables, *plan.decodes
        paged_decode_attention(
            qkv[:n], *decodes, k_cache, v_cache, *rows, num_heads, scale, workspace, out[:n], scales
        )
        if plan.max_query_len:
            q = torch.empty_like(out)  # the chunks' places are those in the step
            cos, sin, cells = chunks
            rope_and_cache(qkv[n:], cos, sin, k_cache, v_cache, cells, num_heads, q[n:], scales)
            self._attend_chunks(q, k_cache, v_cache, plan, scale, out, scales)
        return out

    def attend(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        plan: TritonAttentionPlan,
        scale: float,
        scales: Tensor | None = None,
    ) -> Tensor:
        assert not plan.num_decodes, "`attention` does all of a decode's in one kernel"
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        self._attend_chunks(q, k_cache, v_cache, plan, scale, out, scales)
        return out

    def _decode_workspace(
        self, block_tables: Tensor, num_heads: int, k_cache: Tensor, dtype: torch.dtype
    ) -> DecodeWorkspace:
        """One for all steps of a slot table, whose rows are as many as can decode: captured graphs keep it in use."""
        key = (*block_tables.shape, num_heads, *k_cache.shape[1:], dtype)
        if key not in self._decode_workspaces:
            (num_slots, max_blocks), (_, block_size, num_kv_heads, head_dim) = block_tables.shape, k_cache.shape
            self._decode_workspaces[key] = decode_workspace(
                num_slots, num_heads, num_kv_heads, head_dim, dtype, max_blocks * block_size, k_cache.device
            )
        return self._decode_workspaces[key]

    def _attend_chunks(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        plan: TritonAttentionPlan,
        scale: float,
        out: Tensor,
        scales: Tensor | None,
    ) -> None:
        if (gather := plan.gather(q, k_cache)) is not None:
            attend_gathered(q, k_cache, v_cache, gather, scale, out, scales)
            return
        tables = plan.batch.block_tables, *plan.chunks
        paged_chunk_attention(q, k_cache, v_cache, *tables, plan.max_query_len, scale, out, scales)

    def _or_reference(self, kernel: Callable[..., T], slower: Callable[..., T], *args: object) -> T:
        try:
            return kernel(*args)
        except ValueError as refusal:
            if kernel.__name__ not in self._refusals:
                self._refusals.add(kernel.__name__)
                _log.warning("torch does in several launches what a kernel refuses: %s", refusal)
            return slower(*args)
