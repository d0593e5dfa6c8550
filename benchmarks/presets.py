"""The models that claims are measured on: config.json only, served with dummy weights and without a tokenizer."""

from dataclasses import dataclass
from pathlib import Path

from ..errors import InvalidArgumentError
from ..workers.model_config import ModelConfig

_PRESETS = Path(__file__).parent / "presets"


def preset_names() -> list[str]:
    return sorted(path.parent.name for path in _PRESETS.glob("*/config.json"))


def preset_directory(name: str) -> Path:
    """A Hugging Face model directory without weights. Raises InvalidArgumentError for an unknown name."""
    if name not in preset_names():
        raise InvalidArgumentError(f"no preset {name!r}; there are {', '.join(preset_names())}", "preset")
    return _PRESETS / name


@dataclass(frozen=True, slots=True)
class ModelSize:
    """What the least time of a step depends on."""

    num_parameters: int
    num_parameters_read: int  # in a step: of the input embedding, only a few rows are read
    num_head_parameters: int  # of those, what only tokens that are sampled from need
    num_layers: int
    kv_elements_per_token: int  # of all layers

    @classmethod
    def of(cls, config: ModelConfig) -> "ModelSize":
        embedding = config.vocab_size * config.hidden_size
        body = config.num_layers * _layer_parameters(config) + config.hidden_size  # the final norm
        return cls(
            num_parameters=body + (embedding if config.tie_word_embeddings else 2 * embedding),
            num_parameters_read=body + embedding,
            num_head_parameters=embedding,
            num_layers=config.num_layers,
            kv_elements_per_token=2 * config.num_layers * config.num_kv_heads * config.head_dim,
        )


def _layer_parameters(config: ModelConfig) -> int:
    """Of a layer: q, k, v and o, the three matrices of the MLP, two norms; biases are too few to count."""
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention = 2 * config.hidden_size * (q_size + kv_size)
    return attention + 3 * config.hidden_size * config.intermediate_size + 2 * config.hidden_size
