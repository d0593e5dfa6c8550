"""Llama (arXiv 2302.13971, 2307.09288, 2407.21783): one rank's share of the decoder, over a paged KV cache."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from ...kernels.batch import AttentionBatch
from ...kernels.ops import operations_for
from ..checkpoint import tensor_shapes
from ..kv_cache import KVCache
from ..layers import (
    GateUpParallelLinear,
    LayerContext,
    ParallelLMHead,
    Parameter,
    QKVParallelLinear,
    RMSNorm,
    RowParallelLinear,
    VocabParallelEmbedding,
    VocabParallelTable,
)
from ..model_config import ModelConfig
from ..parallel import TensorParallel
from ..rope import RotaryEmbedding
from ..segments import Segment, SegmentRunner, run_now
from ..weights import Weights

Tensor = torch.Tensor


class Attention:
    """Grouped-query attention with rotary positions."""

    def __init__(self, ctx: LayerContext, config: ModelConfig) -> None:
        heads = config.num_heads, config.num_kv_heads, config.head_dim
        self.qkv_proj = QKVParallelLinear(ctx, config.hidden_size, *heads, bias=config.attention_bias)
        self.o_proj = RowParallelLinear(
            ctx, config.num_heads * config.head_dim, config.hidden_size, config.attention_bias
        )
        self.num_heads, self.num_kv_heads = self.qkv_proj.num_heads, self.qkv_proj.num_kv_heads
        self.head_dim, self.scale = config.head_dim, config.head_dim**-0.5
        self.ops = ctx.ops

    def load(self, weights: Weights, name: str) -> None:
        self.qkv_proj.load(weights, f"{name}.q_proj", f"{name}.k_proj", f"{name}.v_proj")
        self.o_proj.load(weights, f"{name}.o_proj")

    def parameters(self) -> Iterator[Parameter]:
        yield from self.qkv_proj.parameters()
        yield from self.o_proj.parameters()

    def attend(self, qkv: Tensor, step: "Step", cache: tuple[Tensor, ...], out: Tensor | None) -> Tensor:
        """What lies between the two projections: [num_tokens, heads of q, k and v] to [num_tokens, heads of q], the
        latter in `out` if one is given and it can be written there."""
        num_tokens = len(qkv)
        heads = qkv.view(num_tokens, -1, self.head_dim)
        if out is not None:
            out = out.view(num_tokens, -1, self.head_dim)
        return self.ops.attention(
            heads, step.rope, cache, step.kv_indices, step.plan, self.num_heads, self.scale, out
        ).flatten(1)


class MLP:
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, ctx: LayerContext, config: ModelConfig) -> None:
        size = config.intermediate_size
        self.gate_up_proj = GateUpParallelLinear(ctx, config.hidden_size, size, config.mlp_bias)
        self.down_proj = RowParallelLinear(ctx, size, config.hidden_size, config.mlp_bias)

    def load(self, weights: Weights, name: str) -> None:
        self.gate_up_proj.load(weights, f"{name}.gate_proj", f"{name}.up_proj")
        self.down_proj.load(weights, f"{name}.down_proj")

    def parameters(self) -> Iterator[Parameter]:
        yield from self.gate_up_proj.parameters()
        yield from self.down_proj.parameters()


class DecoderLayer:
    """Attention, then MLP, each with its norm before and the residual stream beside it."""

    def __init__(self, ctx: LayerContext, config: ModelConfig) -> None:
        self.input_norm = RMSNorm(ctx, config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(ctx, config)
        self.post_attention_norm = RMSNorm(ctx, config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(ctx, config)

    def load(self, weights: Weights, name: str) -> None:
        self.input_norm.load(weights, f"{name}.input_layernorm")
        self.attention.load(weights, f"{name}.self_attn")
        self.post_attention_norm.load(weights, f"{name}.post_attention_layernorm")
        self.mlp.load(weights, f"{name}.mlp")

    def parameters(self) -> Iterator[Parameter]:
        for part in (self.input_norm, self.attention, self.post_attention_norm, self.mlp):
            yield from part.parameters()

    def project_qkv(self, share: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The QKV product, once the sum of the last layer's shares is in the stream; and the stream."""
        return self.attention.qkv_proj.after(self.input_norm, share, residual)

    def after_attention(self, attended: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """From attention's output to the end of the layer: this rank's share of what the stream still lacks; and it."""
        share = self.attention.o_proj(attended)
        x, residual = self.mlp.gate_up_proj.after(self.post_attention_norm, share, residual)
        return self.mlp.down_proj(x), residual


class Step:
    """What all layers of one step share, computed once."""

    __slots__ = ("kv_indices", "plan", "rope")

    def __init__(self, plan: Any, rope: tuple[Tensor, Tensor], kv_indices: Tensor) -> None:  # noqa: ANN401
        """`plan`: what the operations' plan_attention made."""
        self.plan, self.rope, self.kv_indices = plan, rope, kv_indices


class LlamaForCausalLM:
    """One rank of the model. Its weights are unset until `load_weights`."""

    def __init__(self, config: ModelConfig, tp: TensorParallel, dtype: torch.dtype, max_model_len: int) -> None:
        """Allocates the shard on tp.device. Raises InvalidArgumentError if the model does not split over the ranks."""
        config.validate_tensor_parallel(tp.size)
        self.config, self.dtype = config, dtype
        self.ops, self._tp = operations_for(tp.device), tp
        ctx = LayerContext(tp, dtype, self.ops)
        table_size = config.vocab_size, config.hidden_size
        self._embedding_table = VocabParallelTable(ctx, *table_size, has_lookups=True)
        self._head_table = self._embedding_table
        if not config.tie_word_embeddings:
            self._head_table = VocabParallelTable(ctx, *table_size, has_lookups=False)
        self.embed_tokens = VocabParallelEmbedding(self._embedding_table)
        self.layers = [DecoderLayer(ctx, config) for _ in range(config.num_layers)]
        self.norm = RMSNorm(ctx, config.hidden_size, config.rms_norm_eps)
        self.lm_head = ParallelLMHead(self._head_table)
        self.rope = RotaryEmbedding(config, max_model_len, dtype, tp.device, self.ops)
        # What follows each layer's attention.
        self._segments: list[Segment] = [partial(self._middle_segment, i) for i in range(config.num_layers - 1)]
        self._segments.append(self._last_segment)

    @staticmethod
    def tensor_shapes(config: ModelConfig) -> Mapping[str, tuple[int, ...]]:
        """The tensors of its checkpoints, by name."""
        return tensor_shapes(config)

    @property
    def num_kv_heads(self) -> int:
        """KV heads of this rank: what its KVCache is made with."""
        return self.layers[0].attention.num_kv_heads

    @property
    def vocab_start(self) -> int:
        """The first token of this rank's part of the vocabulary."""
        return self._head_table.start

    @property
    def local_vocab_size(self) -> int:
        """Columns of `logits`, the same on each rank: vocab_size / tp.size, rounded up."""
        return self._head_table.num_rows

    def load_weights(self, weights: Weights) -> None:
        """Fills this rank's shard, converting to the model's dtype."""
        self._embedding_table.load(weights, "model.embed_tokens")
        for i, layer in enumerate(self.layers):
            layer.load(weights, f"model.layers.{i}")
        self.norm.load(weights, "model.norm")
        if not self.config.tie_word_embeddings:
            self._head_table.load(weights, "lm_head")

    def parameters(self) -> Iterator[Parameter]:
        """All that `load_weights` fills, each once, in an order that hangs on the configuration alone."""
        yield from self._embedding_table.parameters()
        for layer in self.layers:
            yield from layer.parameters()
        yield from self.norm.parameters()
        if not self.config.tie_word_embeddings:
            yield from self._head_table.parameters()

    @torch.inference_mode()
    def forward(
        self, token_ids: Tensor, batch: AttentionBatch, kv_cache: KVCache, run: SegmentRunner = run_now
    ) -> Tensor:
        """One step. token_ids: [num_tokens] int32 or int64. Writes their KV to the cache; returns the normed hidden
        states, [num_tokens, hidden_size], the same on each rank.

        `run` runs what lies between the layers' attention: segments that depend on the number of tokens alone.
        """
        step = Step(
            self.ops.plan_attention(batch, kv_cache.block_size, self.dtype),
            self.rope(batch.positions),
            batch.kv_indices,
        )
        made = run(self._first_segment, token_ids)
        for layer, cache, segment in zip(self.layers, kv_cache.layers, self._segments, strict=True):
            qkv, *stream = made
            attended = layer.attention.attend(qkv, step, cache, run.input_of(segment))
            made = run(segment, attended, *stream)
        (hidden,) = made
        return hidden

    # The residual stream goes from segment to segment whole, or in two halves whose sums over the ranks are hidden
    # behind each other's work.

    def _first_segment(self, token_ids: Tensor) -> tuple[Tensor, ...]:
        """From tokens to the first layer's QKV product, and the stream."""
        first = self.layers[0]
        normed, residual = first.input_norm.of_sum(self.embed_tokens(token_ids))
        qkv = first.attention.qkv_proj(normed)
        return qkv, *(residual.chunk(2) if self._tp.sums_in_halves(residual) else (residual,))

    def _middle_segment(self, layer: int, attended: Tensor, *stream: Tensor) -> tuple[Tensor, ...]:
        """From one layer's attention to the next one's QKV product, and the stream."""
        following = self.layers[layer + 1]
        if len(stream) == 1:
            share, residual = self.layers[layer].after_attention(attended, *stream)
            return following.project_qkv(share, residual)
        project = following.attention.qkv_proj
        return self._in_halves(self.layers[layer], following.input_norm, project, attended, stream)

    def _last_segment(self, attended: Tensor, *stream: Tensor) -> tuple[Tensor, ...]:
        """From the last layer's attention to the hidden states."""
        if len(stream) == 1:
            return (self.norm.add(*self.layers[-1].after_attention(attended, *stream))[0],)
        return self._in_halves(self.layers[-1], self.norm, lambda hidden: hidden, attended, stream)[:1]

    def _in_halves(
        self,
        layer: DecoderLayer,
        next_norm: RMSNorm,
        project: Callable[[Tensor], Tensor],
        attended: Tensor,
        stream: tuple[Tensor, ...],
    ) -> tuple[Tensor, ...]:
        """From attention to `project` behind the next norm, and the stream: one half's sums run beside the other's
        products."""
        larger, _ = stream
        sums = [
            self._tp.start_all_reduce(layer.attention.o_proj(half, is_summed_next=False), larger)
            for half in attended.chunk(2)
        ]
        shares = []
        for finish, residual in zip(sums, stream, strict=True):
            x, residual = layer.post_attention_norm.add_sum(finish(), residual)
            share = layer.mlp.down_proj(layer.mlp.gate_up_proj(x), is_summed_next=False)
            shares.append((self._tp.start_all_reduce(share, larger), residual))
        outputs, stream = [], ()
        for finish, residual in shares:
            x, residual = next_norm.add_sum(finish(), residual)
            outputs.append(project(x))
            stream = (*stream, residual)
        return torch.cat(outputs), *stream

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """[n, hidden_size] to [n, local_vocab_size]: columns are tokens from vocab_start on; those behind the
        vocabulary's end are -inf."""
        return self.lm_head(hidden)
