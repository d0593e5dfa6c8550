"""The parts of a decoder, each holding this rank's shard of its weights (Megatron-LM, 3).

Column-parallel layers split their outputs over the ranks, row-parallel ones their inputs: what these give is a rank's
share of a sum, which the norm behind them takes over the ranks.
Weights are plain tensors: Octavo only infers. A layer allocates them in `load`, unless it has before, and fills them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from ..kernels.ops import Operations
from .parallel import TensorParallel
from .weights import Shard, Weights


@dataclass(frozen=True, slots=True)
class LayerContext:
    """What every layer is made with."""

    tp: TensorParallel
    dtype: torch.dtype
    ops: Operations

    def empty(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.tp.device)

    def share_buffer(self, num_tokens: int, size: int) -> torch.Tensor | None:
        """Where this rank's share of a sum over the ranks is best written; None if that does not matter."""
        memory = self.tp.symmetric_memory
        return None if memory is None else memory.input_buffer(num_tokens, size, self.dtype)


def even_shard(size: int, tp: TensorParallel, dim: int = 0) -> Shard:
    """This rank's part of `size`, which the ranks divide."""
    assert size % tp.size == 0, f"{size} does not split over {tp.size} ranks"
    part = size // tp.size
    return Shard(dim, tp.rank * part, (tp.rank + 1) * part)


def kv_head_shard(num_kv_heads: int, tp: TensorParallel) -> Shard:
    """This rank's KV heads: a part of them, or one head that tp.size / num_kv_heads ranks share."""
    if num_kv_heads >= tp.size:
        return even_shard(num_kv_heads, tp)
    assert tp.size % num_kv_heads == 0, f"{num_kv_heads} KV heads cannot be replicated over {tp.size} ranks"
    head = tp.rank * num_kv_heads // tp.size
    return Shard(0, head, head + 1)


class Parameter(Protocol):
    """A tensor of weights on this rank, however its layer keeps it."""

    shape: tuple[int, ...]

    def allocate(self) -> None:
        """Where operations do not pack weights: settles where the tensor will lie, before it is there."""
        ...

    def load(self, fill: Callable[[torch.Tensor], object]) -> None:
        """Has `fill` write the tensor [*shape], contiguous on the device; one loaded before may be gone by then."""
        ...

    def dense(self) -> torch.Tensor:
        """As `fill` wrote it, to be read: contiguous, on the device."""
        ...


class PlainWeight:
    """A tensor that is kept as it is."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.shape = tuple(tensor.shape)
        self._tensor = tensor

    def allocate(self) -> None:
        """It has been, by its layer."""

    def load(self, fill: Callable[[torch.Tensor], object]) -> None:
        fill(self._tensor)

    def dense(self) -> torch.Tensor:
        return self._tensor


class LinearWeight:
    """The weight of a linear layer, held once: packed as the device's matrix product reads it fastest."""

    def __init__(self, ctx: LayerContext, out_size: int, in_size: int, is_packed: bool = True) -> None:
        self.shape: tuple[int, ...] = (out_size, in_size)
        self._ctx, self._is_packed = ctx, is_packed and ctx.ops.packs_weights
        self._packed: torch.Tensor | None = None

    def allocate(self) -> None:
        assert not self._is_packed, "packing gives the tensor another place"
        self._packed = self._ctx.empty(*self.shape)

    def load(self, fill: Callable[[torch.Tensor], object]) -> None:
        """Has `fill` write the tensor [out_size, in_size] where it will lie; or a new one, which it packs, with one
        loaded before gone by then."""
        if not self._is_packed:
            if self._packed is None:
                self.allocate()
            fill(self.packed)
            return
        self._packed = None
        weight = self._ctx.empty(*self.shape)
        fill(weight)
        self._packed = self._ctx.ops.pack_weight(weight)

    def dense(self) -> torch.Tensor:
        return self._ctx.ops.unpack_weight(self.packed) if self._is_packed else self.packed

    @property
    def packed(self) -> torch.Tensor:
        """What the operations' products take."""
        assert self._packed is not None, "the weights are loaded first"
        return self._packed


def _with_bias(weight: LinearWeight, bias: torch.Tensor | None) -> Iterator[Parameter]:
    yield weight
    if bias is not None:
        yield PlainWeight(bias)


class RMSNorm:
    """Root mean square norm, the same on all ranks."""

    def __init__(self, ctx: LayerContext, size: int, eps: float) -> None:
        self.weight = ctx.empty(size)
        self.eps = eps
        self._ops, self._tp = ctx.ops, ctx.tp

    def load(self, weights: Weights, name: str) -> None:
        self.weight.copy_(weights.read(f"{name}.weight"))

    def parameters(self) -> Iterator[Parameter]:
        yield PlainWeight(self.weight)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._ops.rms_norm(x, self.weight, self.eps)

    def of_sum(self, share: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `add` where there is no residual yet: the norm of the sum of `share` over the ranks, and that sum."""
        memory = self._tp.symmetric_memory
        if memory is not None and memory.takes_norm(share):
            return memory.all_reduce_add_rms_norm(share, None, self.weight, self.eps)
        x = self._tp.all_reduce(share)
        return self(x), x

    def add(self, share: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm of x + residual, and that sum, x being the sum of `share` over the ranks."""
        memory = self._tp.symmetric_memory
        if memory is not None and memory.takes_norm(share):
            return memory.all_reduce_add_rms_norm(share, residual, self.weight, self.eps)
        return self.add_sum((self._tp.all_reduce(share),), residual)

    def add_sum(self, parts: tuple[torch.Tensor, ...], residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm of x + residual, and that sum. `parts`: the tensors, one or two, that add up to x, the sum over the
        ranks."""
        x, *other = parts
        return self._ops.add_rms_norm(x, residual, self.weight, self.eps, *other)


class ColumnParallelLinear:
    """Several linear layers of one input, fused into one: this rank's output rows of each, one below the other.

    `shards` are their output rows on this rank, in the order in which `load` gets their names.
    """

    _gated = False  # whether the output is silu of the first half times the second

    def __init__(self, ctx: LayerContext, in_size: int, shards: tuple[Shard, ...], bias: bool) -> None:
        self._ctx, self._shards = ctx, shards
        self._sizes = [shard.stop - shard.start for shard in shards]
        self._weight = LinearWeight(ctx, sum(self._sizes), in_size)
        self._bias = ctx.empty(sum(self._sizes)) if bias else None

    def load(self, weights: Weights, *names: str) -> None:
        self._weight.load(lambda weight: self._fill(weight, weights, [f"{name}.weight" for name in names]))
        if self._bias is not None:
            self._fill(self._bias, weights, [f"{name}.bias" for name in names])

    def _fill(self, whole: torch.Tensor, weights: Weights, names: list[str]) -> None:
        for name, shard, part in zip(names, self._shards, whole.split(self._sizes), strict=True):
            part.copy_(weights.read(name, shard))

    def parameters(self) -> Iterator[Parameter]:
        return _with_bias(self._weight, self._bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        product = self._ctx.ops.gated_linear if self._gated else self._ctx.ops.linear
        return product(x, self._weight.packed, self._bias)

    def after(self, norm: RMSNorm, share: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """This layer of what `norm.add` gives, and the new residual stream."""
        if self._ctx.tp.size > 1:
            x, residual = norm.add(share, residual)
            return self(x), residual
        return self._ctx.ops.add_rms_norm_linear(
            share, residual, (norm.weight, norm.eps), self._weight.packed, self._bias, self._gated
        )


class GateUpParallelLinear(ColumnParallelLinear):
    """An MLP's gate and up projections with the activation between: silu(gate(x)) * up(x), split evenly."""

    _gated = True

    def __init__(self, ctx: LayerContext, in_size: int, out_size: int, bias: bool) -> None:
        shard = even_shard(out_size, ctx.tp)
        super().__init__(ctx, in_size, (shard, shard), bias)


class QKVParallelLinear(ColumnParallelLinear):
    """Query, key and value projections, split by head. Output: this rank's query heads, key heads, value heads."""

    def __init__(self, ctx: LayerContext, in_size: int, num_heads: int, num_kv_heads: int, head_dim: int, bias: bool):  # noqa: ANN204
        kv_heads = kv_head_shard(num_kv_heads, ctx.tp)
        self.num_heads = num_heads // ctx.tp.size
        self.num_kv_heads = kv_heads.stop - kv_heads.start
        q = even_shard(num_heads * head_dim, ctx.tp)
        kv = Shard(0, kv_heads.start * head_dim, kv_heads.stop * head_dim)
        super().__init__(ctx, in_size, (q, kv, kv), bias)


class RowParallelLinear:
    """A linear layer whose input is split over the ranks: each gives its share of the sum that is the output."""

    def __init__(self, ctx: LayerContext, in_size: int, out_size: int, bias: bool) -> None:
        self._ctx = ctx
        self._out_size = out_size
        self._shard = even_shard(in_size, ctx.tp, dim=1)
        self._weight = LinearWeight(ctx, out_size, self._shard.stop - self._shard.start)
        self._bias = ctx.empty(out_size) if bias else None

    def load(self, weights: Weights, name: str) -> None:
        self._weight.load(lambda weight: weight.copy_(weights.read(f"{name}.weight", self._shard)))
        if self._bias is not None:
            self._bias.copy_(weights.read(f"{name}.bias"))

    def parameters(self) -> Iterator[Parameter]:
        return _with_bias(self._weight, self._bias)

    def __call__(self, x: torch.Tensor, is_summed_next: bool = True) -> torch.Tensor:
        """`is_summed_next`: whether a norm sums it before another share is made; both may then lie in one place."""
        # The sum must hold the bias once.
        bias = self._bias if self._ctx.tp.rank == 0 else None
        out = self._ctx.share_buffer(len(x), self._out_size) if is_summed_next else None
        return self._ctx.ops.linear(x, self._weight.packed, bias, out)


class VocabParallelTable:
    """This rank's rows of a [vocab_size, hidden_size] table, with zero rows behind the vocabulary's end."""

    def __init__(self, ctx: LayerContext, vocab_size: int, hidden_size: int, has_lookups: bool) -> None:
        """`has_lookups`: whether tokens are looked up in it. One of products alone is packed for them."""
        self.num_rows = -(-vocab_size // ctx.tp.size)
        self.start = ctx.tp.rank * self.num_rows
        # Tokens that exist: fewer than rows on the last ranks.
        self.num_tokens = max(0, min(self.num_rows, vocab_size - self.start))
        self._ctx, self._hidden_size, self._has_lookups = ctx, hidden_size, has_lookups
        self._weight = LinearWeight(ctx, self.num_rows, hidden_size, is_packed=not has_lookups)

    def load(self, weights: Weights, name: str) -> None:
        self._weight.load(lambda rows: self._fill(rows, weights, name))

    def _fill(self, rows: torch.Tensor, weights: Weights, name: str) -> None:
        rows[self.num_tokens :].zero_()
        if self.num_tokens:
            shard = Shard(0, self.start, self.start + self.num_tokens)
            rows[: self.num_tokens].copy_(weights.read(f"{name}.weight", shard))

    def parameters(self) -> Iterator[Parameter]:
        yield self._weight

    def lookup(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[n] int32 or int64 to [n, hidden_size]: rows of the tokens that are here, zeros for others."""
        assert self._has_lookups, "a packed table has no rows to look up"
        out = self._ctx.share_buffer(len(token_ids), self._hidden_size)
        return self._ctx.ops.embed(token_ids, self._weight.packed, self.start, out)

    def product(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, hidden_size] to [n, num_rows]: hidden @ table.T."""
        return self._ctx.ops.linear(hidden, self._weight.packed, None)


class VocabParallelEmbedding:
    """Each rank looks up the tokens it holds: its share of a sum over the ranks, which has them all."""

    def __init__(self, table: VocabParallelTable) -> None:
        self._table = table

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self._table.lookup(token_ids)


class ParallelLMHead:
    """Logits of this rank's part of the vocabulary."""

    def __init__(self, table: VocabParallelTable) -> None:
        self._table = table

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, hidden_size] to [n, num_rows]; columns behind the vocabulary's end are -inf."""
        logits = self._table.product(hidden)
        if self._table.num_tokens < self._table.num_rows:
            logits[:, self._table.num_tokens :] = -torch.inf
        return logits
