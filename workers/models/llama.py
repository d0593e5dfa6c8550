"""Llama (arXiv 2302.13971, 2307.09288, 2407.21783): one rank's share of the decoder, over a paged KV cache."""

from collections.abc import Mapping
from typing import Any

import torch

from ...kernels.batch import AttentionBatch
from ...kernels.ops import operations_for
from ..checkpoint import tensor_shapes
from ..kv_cache import KVCache
from ..layers import (
    LayerContext,
    MergedColumnParallelLinear,
    ParallelLMHead,
    QKVParallelLinear,
    RMSNorm,
    RowParallelLinear,
    VocabParallelEmbedding,
    VocabParallelTable,
)
from ..model_config import ModelConfig
from ..parallel import TensorParallel
from ..rope import RotaryEmbedding
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

    def __call__(self, x: Tensor, step: "Step", cache: tuple[Tensor, Tensor]) -> Tensor:
        qkv = self.qkv_proj(x).view(len(x), -1, self.head_dim)
        q = self.ops.rope_and_cache(qkv, step.cos, step.sin, *cache, step.kv_indices, self.num_heads)
        return self.o_proj(self.ops.attend(q, *cache, step.attention, self.scale).flatten(1))


class MLP:
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, ctx: LayerContext, config: ModelConfig) -> None:
        size = config.intermediate_size
        self.gate_up_proj = MergedColumnParallelLinear(ctx, config.hidden_size, (size, size), config.mlp_bias)
        self.down_proj = RowParallelLinear(ctx, size, config.hidden_size, config.mlp_bias)
        self.ops = ctx.ops

    def load(self, weights: Weights, name: str) -> None:
        self.gate_up_proj.load(weights, f"{name}.gate_proj", f"{name}.up_proj")
        self.down_proj.load(weights, f"{name}.down_proj")

    def __call__(self, x: Tensor) -> Tensor:
        return self.down_proj(self.ops.silu_and_mul(self.gate_up_proj(x)))


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

    def __call__(
        self, x: Tensor | None, residual: Tensor, step: "Step", cache: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """x: the sublayer output that the stream still lacks; None before the first layer."""
        if x is None:
            x = self.input_norm(residual)
        else:
            x, residual = self.input_norm.add(x, residual)
        x, residual = self.post_attention_norm.add(self.attention(x, step, cache), residual)
        return self.mlp(x), residual


class Step:
    """What all layers of one step share, computed once."""

    __slots__ = ("attention", "cos", "kv_indices", "sin")

    def __init__(self, attention: Any, rope: tuple[Tensor, Tensor], kv_indices: Tensor) -> None:  # noqa: ANN401
        """`attention`: what the operations' plan_attention made."""
        self.attention, self.kv_indices = attention, kv_indices
        self.cos, self.sin = rope


class LlamaForCausalLM:
    """One rank of the model. Its weights are unset until `load_weights`."""

    def __init__(self, config: ModelConfig, tp: TensorParallel, dtype: torch.dtype, max_model_len: int) -> None:
        """Allocates the shard on tp.device. Raises InvalidArgumentError if the model does not split over the ranks."""
        config.validate_tensor_parallel(tp.size)
        self.config, self.dtype = config, dtype
        self.ops = operations_for(tp.device)
        ctx = LayerContext(tp, dtype, self.ops)
        table_size = config.vocab_size, config.hidden_size
        self._embedding_table = VocabParallelTable(ctx, *table_size, has_lookups=True)
        self._head_table = self._embedding_table
        if not config.tie_word_embeddings:
            self._head_table = VocabParallelTable(ctx, *table_size, has_lookups=False)
        self.embed_tokens = VocabParallelEmbedding(ctx, self._embedding_table)
        self.layers = [DecoderLayer(ctx, config) for _ in range(config.num_layers)]
        self.norm = RMSNorm(ctx, config.hidden_size, config.rms_norm_eps)
        self.lm_head = ParallelLMHead(self._head_table)
        self.rope = RotaryEmbedding(config, max_model_len, dtype, tp.device)

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

    @torch.inference_mode()
    def forward(self, token_ids: Tensor, batch: AttentionBatch, kv_cache: KVCache) -> Tensor:
        """One step. token_ids: [num_tokens] int64. Writes their KV to the cache; returns the normed hidden states,
        [num_tokens, hidden_size], the same on each rank."""
        plan = self.ops.plan_attention(batch, kv_cache.block_size, self.dtype)
        step = Step(plan, self.rope(batch.positions), batch.kv_indices)
        x: Tensor | None = None
        residual = self.embed_tokens(token_ids)
        for i, layer in enumerate(self.layers):
            x, residual = layer(x, residual, step, kv_cache.layer(i))
        assert x is not None, "a model has layers"
        return self.norm.add(x, residual)[0]

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """[n, hidden_size] to float32 [n, local_vocab_size]: columns are tokens from vocab_start on; those behind the
        vocabulary's end are -inf."""
        return self.lm_head(hidden)
