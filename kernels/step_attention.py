"""What a step's layers do between the QKV product and the output projection, on a GPU: the same few launches each."""

from collections.abc import Callable
from itertools import pairwise

import torch

from .batch import AttentionBatch
from .chunk_attention import chunk_attention_launch
from .chunk_splits import ChunkRows, ChunkWorkspace, plan_chunk_splits, sent
from .decode_attention import decode_attention_launch
from .decode_splits import DecodeWorkspace, num_sms
from .gathered_chunks import GatherPlan, attend_gathered, is_worth_gathering, plan_gather
from .launch import Launch
from .prefix_attention import prefix_attention_launch
from .rope_cache import rope_and_cache_launch
from .shared_prefixes import PrefixJobs
from .split_chunk_attention import split_chunk_launches

Tensor = torch.Tensor
# Of all the kernels, for the tensors of a layer's cache; the last is an FP8 cache's.
_CACHE_ARGUMENTS = "k_cache_ptr", "v_cache_ptr", "scales_ptr"


class StepAttention:
    """The attention of one step, planned with its first layer.

    Layers differ in their tensors' memory alone: what else there is to know of a launch is found out once.
    """

    def __init__(
        self,
        batch: AttentionBatch,
        decode_workspace: Callable[[Tensor, int, Tensor], DecodeWorkspace],
        chunk_workspace: Callable[[Tensor, Tensor], ChunkWorkspace],
        prefix_jobs: Callable[[AttentionBatch, Tensor, int, int], PrefixJobs | None],
    ) -> None:
        """`decode_workspace`: for block tables, a number of query heads and a layer's keys; `chunk_workspace`: for
        queries and a layer's keys; `prefix_jobs`: for a layer's QKV product and the numbers of its query heads and KV
        heads."""
        self._batch = batch
        self._prefix_jobs = prefix_jobs
        self._decode_workspace, self._chunk_workspace = decode_workspace, chunk_workspace
        starts = batch.host_query_starts[batch.num_decode_rows :]
        self._max_query_len = max((end - start for start, end in pairwise(starts)), default=0)  # of the chunks
        self._layers: _Layers | None = None

    def attend(
        self,
        qkv: Tensor,
        rope: tuple[Tensor, Tensor],
        cache: tuple[Tensor, ...],
        kv_indices: Tensor,
        num_heads: int,
        scale: float,
        out: Tensor | None,
    ) -> Tensor:
        """As Operations.attention. All but qkv, cache and out are the same for all layers; so are these but for where
        they lie."""
        if out is None:
            out = qkv.new_empty(len(qkv), num_heads, qkv.shape[-1])
        if self._layers is None:
            with torch.cuda.device_of(qkv):
                self._layers = self._plan(qkv, rope, cache, kv_indices, num_heads, scale, out)
                self._layers.attend(qkv, cache, out)
        else:
            self._layers.attend(qkv, cache, out)
        return out

    def _plan(
        self,
        qkv: Tensor,
        rope: tuple[Tensor, Tensor],
        cache: tuple[Tensor, ...],
        kv_indices: Tensor,
        num_heads: int,
        scale: float,
        out: Tensor,
    ) -> "_Layers":
        batch, n, (cos, sin) = self._batch, self._batch.num_decode_rows, rope
        keys, values = cache[:2]
        scales = cache[2] if len(cache) > 2 else None
        layers = _Layers(n, scale)
        if n:
            workspace = self._decode_workspace(batch.block_tables, num_heads, cache[0])
            rows = batch.block_tables, batch.slots[:n], batch.seq_lens[:n]
            jobs = self._prefix_jobs(batch, qkv, num_heads, keys.shape[2]) if batch.prefixes else None
            layers.decodes = decodes = decode_attention_launch(
                qkv[:n],
                cos[:n],
                sin[:n],
                kv_indices[:n],
                keys,
                values,
                *rows,
                num_heads,
                scale,
                workspace,
                out[:n],
                scales,
                jobs,
            )
            if jobs is not None:
                layers.prefixes = prefix_attention_launch(decodes, jobs)
        if not self._max_query_len:
            return layers
        layers.q = q = torch.empty_like(out)  # the chunks' places are those in the step
        layers.rope = rope_and_cache_launch(
            qkv[n:], cos[n:], sin[n:], keys, values, kv_indices[n:], num_heads, q[n:], scales
        )
        if is_worth_gathering(batch, qkv.shape[-1], qkv.dtype, is_fp8=scales is not None):
            layers.gather = plan_gather(batch, num_heads, cache[0].shape[1])
        else:
            layers.chunks = self._plan_chunks(q, keys, values, scale, out, scales)
        return layers

    def _plan_chunks(
        self, q: Tensor, keys: Tensor, values: Tensor, scale: float, out: Tensor, scales: Tensor | None
    ) -> tuple[Launch, ...]:
        """Through their block tables: with programs that share a context where that is faster."""
        batch, n = self._batch, self._batch.num_decode_rows
        _, num_heads, head_dim = q.shape
        # Whether this step needs it or not, so that what is measured at the start has its memory.
        workspace = self._chunk_workspace(q, keys)
        rows = ChunkRows.of(batch.host_query_starts[n:], batch.host_seq_lens[n:])
        splits = plan_chunk_splits(rows, num_heads, keys.shape[2], head_dim, q.dtype, num_sms(q.device))
        if splits is not None:
            places = batch.block_tables, batch.slots[n:]
            plan = sent(splits, q.device)
            return split_chunk_launches(q, keys, values, *places, plan, workspace, scale, out, scales)
        tables = batch.block_tables, batch.slots[n:], batch.seq_lens[n:], batch.query_starts[n:]
        return (chunk_attention_launch(q, keys, values, *tables, self._max_query_len, scale, out, scales),)


class _Layers:
    """What each layer of a step launches: in this order, what there is of it."""

    __slots__ = ("_num_decodes", "_scale", "chunks", "decodes", "gather", "prefixes", "q", "rope")

    def __init__(self, num_decodes: int, scale: float) -> None:
        self._num_decodes, self._scale = num_decodes, scale
        self.prefixes: Launch | None = None  # what decodes share
        self.decodes: Launch | None = None
        # Of the chunks: the memory that all layers' rotated queries take, what puts them there, and what reads them.
        self.q: Tensor | None = None
        self.rope: Launch | None = None
        self.gather: GatherPlan | None = None
        self.chunks: tuple[Launch, ...] = ()  # the first alone reads the cache

    def attend(self, qkv: Tensor, cache: tuple[Tensor, ...], out: Tensor) -> None:
        cache_ptrs = dict(zip(_CACHE_ARGUMENTS, cache, strict=False))
        if self.prefixes is not None:
            self.prefixes.run(qkv_ptr=qkv, **cache_ptrs)
        if self.decodes is not None:
            self.decodes.run(qkv_ptr=qkv, out_ptr=out, **cache_ptrs)
        if self.rope is not None:
            self.rope.run(qkv_ptr=qkv[self._num_decodes :], **cache_ptrs)
        if self.chunks:
            attend, *merge = self.chunks
            attend.run(out_ptr=out, **cache_ptrs)
            for launch in merge:
                launch.run(out_ptr=out)
        elif self.gather is not None:
            assert self.q is not None, "it is planned with the queries' memory"
            keys, values, *scales = cache
            attend_gathered(self.q, keys, values, self.gather, self._scale, out, *scales)
