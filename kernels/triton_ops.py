"""The operations of a GPU: Triton kernels, put together as layers call them, and cuBLAS for large matrix products."""

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from .activation import silu_and_mul
from .batch import AttentionBatch, SharedPrefix
from .chunk_splits import MAX_GROUP, ChunkWorkspace, chunk_workspace
from .decode_splits import DecodeWorkspace, decode_workspace, num_sms
from .gemv import MAX_NORM_SIZE, add_norm_gemv, gemv, gemv_silu_and_mul
from .linear_config import LinearKernel, linear_kernel
from .lookup import embed, rope_rows
from .norm import add_rms_norm, rms_norm
from .ops import Operations
from .shared_prefixes import PrefixJobs, plan_prefix_jobs, sent
from .small_matmul import SplitWorkspace, small_matmul, small_matmul_silu_and_mul
from .step_attention import StepAttention

_log = logging.getLogger(__name__)

Tensor = torch.Tensor
T = TypeVar("T")


@contextmanager
def _cublas_lt() -> Iterator[None]:
    """Has torch leave matrix products to cuBLASLt. A setting of the process: one thread launches all of them."""
    before = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library("cublaslt")
    try:
        yield
    finally:
        torch.backends.cuda.preferred_blas_library(before)


def _prefix_jobs(
    prefixes: tuple[SharedPrefix, ...],
    num_rows: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> PrefixJobs | None:
    """As plan_prefix_jobs, on the device."""
    shape = num_rows, num_heads, num_kv_heads, head_dim
    jobs = plan_prefix_jobs(prefixes, *shape, dtype, num_sms(device))
    return None if jobs is None else sent(jobs, device)


class TritonOperations(Operations):
    """Triton kernels; what they refuse, the reference does, which the log says once."""

    def __init__(self, device: torch.device) -> None:
        """For one stream of `device`: launches share a workspace."""
        self._split_workspace = SplitWorkspace(device)
        self._decode_workspaces: dict[tuple[object, ...], DecodeWorkspace] = {}
        self._chunk_workspaces: dict[tuple[object, ...], ChunkWorkspace] = {}
        # The last step's plan is kept: decodes go on step by step with the same prefixes.
        self._prefix_jobs = functools.lru_cache(maxsize=1)(_prefix_jobs)
        self._refusals: set[str] = set()

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
        match linear_kernel(len(x), weight):
            case LinearKernel.GEMV:
                return gemv(x, weight, bias)
            case LinearKernel.SMALL_MATMUL:
                return small_matmul(x, weight, bias, self._split_workspace)
            case LinearKernel.CUBLAS_LT:
                with _cublas_lt():
                    return super().linear(x, weight, bias, out)
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

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, other: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self._or_reference(add_rms_norm, super().add_rms_norm, x, residual, weight, eps, other)

    def plan_attention(self, batch: AttentionBatch, block_size: int, dtype: torch.dtype) -> StepAttention:
        """Computes nothing: the kernels read the step's tensors."""
        del block_size, dtype
        return StepAttention(batch, self._decode_workspace, self._chunk_workspace, self._plan_prefixes)

    def attention(
        self,
        qkv: Tensor,
        rope: tuple[Tensor, Tensor],
        cache: tuple[Tensor, ...],
        kv_indices: Tensor,
        plan: StepAttention,
        num_heads: int,
        scale: float,
        out: Tensor | None = None,
    ) -> Tensor:
        return plan.attend(qkv, rope, cache, kv_indices, num_heads, scale, out)

    def reads_prefixes_once(self, num_heads: int, num_kv_heads: int) -> bool:
        return num_heads // num_kv_heads <= MAX_GROUP

    def _decode_workspace(self, block_tables: Tensor, num_heads: int, k_cache: Tensor) -> DecodeWorkspace:
        """One for all steps of a slot table, whose rows are as many as can decode: captured graphs keep it in use."""
        key = (*block_tables.shape, num_heads, *k_cache.shape[1:], k_cache.dtype)
        if key not in self._decode_workspaces:
            (num_slots, max_blocks), (_, block_size, num_kv_heads, head_dim) = block_tables.shape, k_cache.shape
            self._decode_workspaces[key] = decode_workspace(
                num_slots, num_heads, num_kv_heads, head_dim, k_cache.dtype, max_blocks * block_size, k_cache.device
            )
        return self._decode_workspaces[key]

    def _chunk_workspace(self, q: Tensor, k_cache: Tensor) -> ChunkWorkspace:
        """One for all steps of a model."""
        (_, num_heads, head_dim), num_kv_heads = q.shape, k_cache.shape[2]
        key = num_heads, num_kv_heads, head_dim, q.dtype
        if key not in self._chunk_workspaces:
            self._chunk_workspaces[key] = chunk_workspace(*key, num_sms(q.device), q.device)
        return self._chunk_workspaces[key]

    def _plan_prefixes(
        self, batch: AttentionBatch, qkv: Tensor, num_heads: int, num_kv_heads: int
    ) -> PrefixJobs | None:
        shape = batch.num_decode_rows, num_heads, num_kv_heads, qkv.shape[-1]
        return self._prefix_jobs(batch.prefixes, *shape, qkv.dtype, qkv.device)

    def _or_reference(self, kernel: Callable[..., T], slower: Callable[..., T], *args: object) -> T:
        try:
            return kernel(*args)
        except ValueError as refusal:
            if kernel.__name__ not in self._refusals:
                self._refusals.add(kernel.__name__)
                _log.warning("torch does in several launches what a kernel refuses: %s", refusal)
            return slower(*args)
