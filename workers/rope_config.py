"""The rotary embedding's parameters, from either form that config.json has: rope_scaling or rope_parameters.

Imports neither torch nor transformers, so the launcher can check a model without waiting for them.
"""

from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")

_REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (),
}


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Parameters of one rope type; those of other types keep their defaults."""

    rope_type: str
    theta: float
    original_max_position_embeddings: int  # context length of the pretraining
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    attention_factor: float | None = None  # yarn; None: from factor and mscale
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn

    @classmethod
    def from_dict(cls, config: dict[str, Any], max_position_embeddings: int) -> "RopeConfig":
        """Reads what config.json says about rope. Raises CheckpointError for a type or a field that is not served."""
        fields = config.get("rope_scaling") or config.get("rope_parameters") or {}
        if not isinstance(fields, dict):
            raise CheckpointError("config.json: rope_scaling / rope_parameters must be an object")
        rope_type = fields.get("rope_type", fields.get("type", "default"))
        if rope_type not in ROPE_TYPES:
            raise CheckpointError(
                f"config.json: rope type {rope_type!r} is not served; served: {', '.join(ROPE_TYPES)}"
            )
        _refuse_partial_rotary(config, fields)
        if missing := [name for name in _REQUIRED[rope_type] if fields.get(name) is None]:
            raise CheckpointError(f"config.json: rope type {rope_type!r} needs {', '.join(missing)}")
        return cls._from_fields(rope_type, config, fields, max_position_embeddings)

    @classmethod
    def _from_fields(
        cls, rope_type: str, config: dict[str, Any], fields: dict[str, Any], max_position_embeddings: int
    ) -> "RopeConfig":
        original = (
            config.get("original_max_position_embeddings")
            or fields.get("original_max_position_embeddings")
            or max_position_embeddings
        )
        theta = fields.get("rope_theta") or config.get("rope_theta") or 10_000.0
        factor = fields.get("factor")
        if factor is None and rope_type == "yarn":
            factor = max_position_embeddings / original
        try:
            rope = cls(
                rope_type=rope_type,
                theta=_positive("rope_theta", theta),
                original_max_position_embeddings=int(original),
                factor=1.0 if factor is None else _positive("factor", factor),
                low_freq_factor=_positive("low_freq_factor", fields.get("low_freq_factor", 1.0)),
                high_freq_factor=_positive("high_freq_factor", fields.get("high_freq_factor", 4.0)),
                attention_factor=_optional_float(fields.get("attention_factor")),
                beta_fast=float(fields.get("beta_fast") or 32.0),
                beta_slow=float(fields.get("beta_slow") or 1.0),
                mscale=_optional_float(fields.get("mscale")),
                mscale_all_dim=_optional_float(fields.get("mscale_all_dim")),
                truncate=bool(fields.get("truncate", True)),
            )
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"config.json: a rope parameter is not a number: {error}") from error
        if rope_type == "llama3" and rope.low_freq_factor >= rope.high_freq_factor:
            raise CheckpointError("config.json: rope parameter low_freq_factor must be under high_freq_factor")
        return rope


def _refuse_partial_rotary(config: dict[str, Any], fields: dict[str, Any]) -> None:
    partial = fields.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise CheckpointError(f"config.json: partial_rotary_factor {partial} is not served; only 1.0 is")


def _positive(name: str, value: Any) -> float:  # noqa: ANN401 (straight from JSON)
    number = float(value)
    if not number > 0:
        raise CheckpointError(f"config.json: rope parameter {name} must be positive, not {value}")
    return number


def _optional_float(value: Any) -> float | None:  # noqa: ANN401 (straight from JSON)
    return None if value is None else float(value)
