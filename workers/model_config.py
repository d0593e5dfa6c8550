"""What config.json says about a model, checked.

Imports neither torch nor transformers, so the launcher can check a model without waiting for them.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, InvalidArgumentError, NotFoundError
from .rope_config import RopeConfig

ARCHITECTURES = ("LlamaForCausalLM",)
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of one decoder-only model. Sizes count elements of the whole model, not of a rank."""

    architecture: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    max_position_embeddings: int  # context length that the model was made for, in tokens
    rope: RopeConfig
    eos_token_ids: tuple[int, ...]
    dtype: str  # of the checkpoint: one of DTYPES

    @classmethod
    def from_directory(cls, path: str | Path, architectures: Sequence[str] = ARCHITECTURES) -> "ModelConfig":
        """Reads config.json and generation_config.json of a Hugging Face model directory.

        Raises NotFoundError when there is no such directory, CheckpointError for anything in it that is not served.
        """
        path = Path(path)
        if not path.is_dir():
            raise NotFoundError(f"model directory {path} does not exist; give a Hugging Face model directory")
        config = _read_json(path / "config.json")
        if config is None:
            raise CheckpointError(f"{path} has no config.json; it is not a Hugging Face model directory")
        generation_config = _read_json(path / "generation_config.json") or {}
        return cls._from_dicts(config, generation_config, architectures)

    @classmethod
    def _from_dicts(
        cls, config: dict[str, Any], generation_config: dict[str, Any], architectures: Sequence[str]
    ) -> "ModelConfig":
        architecture = _architecture(config, architectures)
        _refuse_what_is_not_served(config)
        hidden_size, num_heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
        max_position_embeddings = _size(config, "max_position_embeddings", 2048)
        return cls(
            architecture=architecture,
            hidden_size=hidden_size,
            intermediate_size=_size(config, "intermediate_size"),
            num_layers=_size(config, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=_num_kv_heads(config, num_heads),
            head_dim=_head_dim(config, hidden_size, num_heads),
            vocab_size=_size(config, "vocab_size"),
            rms_norm_eps=_number(config, "rms_norm_eps", 1e-6),
            tie_word_embeddings=_flag(config, "tie_word_embeddings"),
            attention_bias=_flag(config, "attention_bias"),
            mlp_bias=_flag(config, "mlp_bias"),
            max_position_embeddings=max_position_embeddings,
            rope=RopeConfig.from_dict(config, max_position_embeddings),
            eos_token_ids=_eos_token_ids(config, generation_config),
            dtype=_dtype(config),
        )

    def validate_tensor_parallel(self, size: int) -> None:
        """Raises InvalidArgumentError, naming the sizes that work, unless the model splits over `size` ranks."""
        if self._splits_over(size):
            return
        sizes = ", ".join(str(n) for n in range(1, self.num_heads + 1) if self._splits_over(n))
        raise InvalidArgumentError(
            f"tensor_parallel_size {size} does not split the model: {self.num_heads} attention heads, "
            f"{self.num_kv_heads} KV heads, MLP of {self.intermediate_size}; sizes that do: {sizes}",
            field="tensor_parallel_size",
        )

    def _splits_over(self, size: int) -> bool:
        return (
            size >= 1
            and self.num_heads % size == 0
            and (self.num_kv_heads % size == 0 or size % self.num_kv_heads == 0)
            and self.intermediate_size % size == 0
        )


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return value


def _architecture(config: dict[str, Any], served: Sequence[str]) -> str:
    named = config.get("architectures") or []
    for architecture in named if isinstance(named, list) else [named]:
        if architecture in served:
            return str(architecture)
    raise CheckpointError(
        f"config.json: architecture {', '.join(map(str, named)) or '(none named)'} is not served; "
        f"served: {', '.join(served)}"
    )


def _refuse_what_is_not_served(config: dict[str, Any]) -> None:
    if (activation := config.get("hidden_act", "silu")) != "silu":
        raise CheckpointError(f"config.json: hidden_act {activation!r} is not served; only 'silu' is")
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise CheckpointError(f"config.json: quantization {method!r} is not served; use an unquantized checkpoint")


def _size(config: dict[str, Any], name: str, default: int | None = None) -> int:
    value = config.get(name)
    value = default if value is None else value
    if value is None:
        raise CheckpointError(f"config.json has no {name}")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"config.json: {name} must be a positive integer, not {value!r}")
    return value


def _number(config: dict[str, Any], name: str, default: float) -> float:
    value = config.get(name, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise CheckpointError(f"config.json: {name} must be a positive number, not {value!r}")
    return float(value)


def _flag(config: dict[str, Any], name: str) -> bool:
    value = config.get(name, False)
    if not isinstance(value, bool):
        raise CheckpointError(f"config.json: {name} must be true or false, not {value!r}")
    return value


def _num_kv_heads(config: dict[str, Any], num_heads: int) -> int:
    num_kv_heads = _size(config, "num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise CheckpointError(
            f"config.json: num_attention_heads {num_heads} is no multiple of num_key_value_heads {num_kv_heads}"
        )
    return num_kv_heads


def _head_dim(config: dict[str, Any], hidden_size: int, num_heads: int) -> int:
    if config.get("head_dim") is None and hidden_size % num_heads:
        raise CheckpointError(
            f"config.json: no head_dim, and hidden_size {hidden_size} is no multiple of num_attention_heads {num_heads}"
        )
    head_dim = _size(config, "head_dim", hidden_size // num_heads)
    if head_dim % 2:
        raise CheckpointError(f"config.json: head_dim {head_dim} is odd; rotary embeddings need an even one")
    return head_dim


def _eos_token_ids(config: dict[str, Any], generation_config: dict[str, Any]) -> tuple[int, ...]:
    """Those of both files, each once, config.json's first."""
    ids: list[int] = []
    for source in (config, generation_config):
        value = source.get("eos_token_id")
        for token_id in value if isinstance(value, list) else [value]:
            if token_id is not None and not _is_token_id(token_id):
                raise CheckpointError(f"eos_token_id must be a token id or a list of them, not {value!r}")
            if token_id is not None and token_id not in ids:
                ids.append(token_id)
    return tuple(ids)


def _is_token_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _dtype(config: dict[str, Any]) -> str:
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    if dtype not in DTYPES:
        raise CheckpointError(f"config.json: dtype {dtype!r} is not served; served: {', '.join(DTYPES)}")
    return str(dtype)
