"""Rotary position embedding: inverse frequencies with the scalings of Llama's family, and the cos/sin tables.

The numbers are those of transformers' modeling_rope_utils. One rule is ours: a table is a function of the position
alone, because the cached keys of a sequence are never rotated again. For "dynamic" (NTK-aware by length) the row of
position p takes the frequencies of a sequence of p + 1 tokens. That is what transformers computes for every token it
decodes, and for every prompt within max_position_embeddings; a longer prompt it rotates as a whole with the frequencies
of its full length, which chunks cannot do, so beyond max_position_embeddings such prompts differ.
"""

import math

import torch

from ..kernels.ops import Operations
from .model_config import ModelConfig
from .rope_config import RopeConfig


class RotaryEmbedding:
    """Tables [max_model_len, head_dim] of cos and sin, in the model's dtype, the first half of sin negated."""

    def __init__(
        self, config: ModelConfig, max_model_len: int, dtype: torch.dtype, device: torch.device, ops: Operations
    ) -> None:
        frequencies = inverse_frequencies(config, max_model_len)  # [1 or max_model_len, head_dim / 2]
        angles = torch.arange(max_model_len, dtype=torch.float32)[:, None] * frequencies
        scale = attention_factor(config.rope)
        cos, sin = angles.cos() * scale, angles.sin() * scale
        self._ops = ops
        self.cos = torch.cat((cos, cos), dim=-1).to(device, dtype)
        self.sin = torch.cat((-sin, sin), dim=-1).to(device, dtype)

    def __call__(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[num_tokens] to two tensors [num_tokens, 1, head_dim], which serve every layer of the step."""
        return self._ops.rope_rows(positions, self.cos, self.sin)


def inverse_frequencies(config: ModelConfig, max_model_len: int) -> torch.Tensor:
    """[1, head_dim / 2] float32, or [max_model_len, head_dim / 2] where they depend on the position."""
    rope, dim = config.rope, config.head_dim
    match rope.rope_type:
        case "default":
            return _inverse_powers(rope.theta, dim)
        case "linear":
            return _inverse_powers(rope.theta, dim) / rope.factor
        case "dynamic":
            return _dynamic(rope, dim, config.max_position_embeddings, max_model_len)
        case "llama3":
            return _llama3(rope, dim)
        case "yarn":
            return _yarn(rope, dim)
        case other:
            raise AssertionError(f"RopeConfig let rope type {other!r} pass")


def attention_factor(rope: RopeConfig) -> float:
    """What cos and sin are multiplied with (YaRN, 3.4); 1 for the other types."""
    if rope.rope_type != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return _yarn_scale(rope.factor, rope.mscale) / _yarn_scale(rope.factor, rope.mscale_all_dim)
    return _yarn_scale(rope.factor, 1.0)


def _yarn_scale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _inverse_powers(base: float | torch.Tensor, dim: int) -> torch.Tensor:
    """base ^ (-2i / dim) for each pair i. [1, dim / 2], or [len(base), dim / 2]."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    return 1.0 / (base**exponents).view(-1, dim // 2)


def _dynamic(rope: RopeConfig, dim: int, max_position_embeddings: int, max_model_len: int) -> torch.Tensor:
    seq_lens = torch.arange(1, max_model_len + 1, dtype=torch.float32).clamp(min=max_position_embeddings)
    stretch = rope.factor * seq_lens / max_position_embeddings - (rope.factor - 1)
    return _inverse_powers(rope.theta * stretch[:, None] ** (dim / (dim - 2)), dim)


def _llama3(rope: RopeConfig, dim: int) -> torch.Tensor:
    """Llama 3.1: long wavelengths are divided by `factor`, short ones kept, those between interpolated."""
    frequencies = _inverse_powers(rope.theta, dim)
    rotations = rope.original_max_position_embeddings * frequencies / (2 * math.pi)
    smooth = (rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    smooth = smooth.clamp(0, 1)
    return (1 - smooth) * frequencies / rope.factor + smooth * frequencies


def _yarn(rope: RopeConfig, dim: int) -> torch.Tensor:
    """YaRN, 3.2 (NTK by parts): a ramp over dimensions from extrapolation to interpolation."""
    frequencies = _inverse_powers(rope.theta, dim)
    low, high = _yarn_dimension(rope, dim, rope.beta_fast), _yarn_dimension(rope, dim, rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001
    interpolated = ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return frequencies / rope.factor * interpolated + frequencies * (1 - interpolated)


def _yarn_dimension(rope: RopeConfig, dim: int, num_rotations: float) -> float:
    """The dimension whose wavelength turns `num_rotations` times within the pretraining's context."""
    turns = rope.original_max_position_embeddings / (num_rotations * 2 * math.pi)
    return dim * math.log(turns) / (2 * math.log(rope.theta))
