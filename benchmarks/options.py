"""The options that every benchmark takes: which model, how it is served, where the result goes.

Prefix caching is off unless asked for: repeats of the same prompts would be found, not computed, and their times lie.
"""

import inspect
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from ..errors import InvalidArgumentError
from ..launch.config import ServeConfig
from ..launch.serve_command import option_parameter
from ..workers.model_config import ModelConfig
from .presets import preset_directory
from .report import Value

PresetOption = Annotated[str | None, typer.Option(help="A shape with random weights: cpu-6m, llama-1b, llama-8b, ...")]
ModelOption = Annotated[str | None, typer.Option(help="A Hugging Face model directory instead of a preset.")]
SeedOption = Annotated[int, typer.Option(help="Of prompts, arrivals and random weights.")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.")]

# The options of `octavo serve` that change what is measured; ports and names do not.
_SERVED = (
    *("tensor_parallel_size", "num_groups", "num_gateways", "device", "dtype", "kv_cache_dtype", "load_format"),
    *("block_size", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "gpu_memory_utilization"),
    *("num_gpu_blocks_override", "num_inflight_steps", "itl_target_ms", "enable_prefix_caching", "swap_space"),
    *("enforce_eager", "ray_address"),
)
_MAX_MODEL_LEN = 16_384  # of presets, unless asked for: longer ones only cost memory here


def with_serve_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the options of `octavo serve` added; it gets those that were given as `given`."""
    own = list(inspect.signature(command).parameters.values())
    hints = get_type_hints(ServeConfig)
    served = [option_parameter(spec, hints[spec.name]) for spec in fields(ServeConfig) if spec.name in _SERVED]

    def run(**options: Any) -> None:  # noqa: ANN401 (options of every type)
        given = {name: options.pop(name) for name in _SERVED}
        command(**options, given={name: value for name, value in given.items() if value is not None})

    own_keywords = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
    parameters = [parameter for parameter in own_keywords if parameter.name != "given"] + served
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__doc__ = command.__doc__
    return run


def model_directory(preset: str | None, model: str | None) -> Path:
    """Raises InvalidArgumentError unless exactly one of them is given."""
    if (preset is None) == (model is None):
        raise InvalidArgumentError("give --preset or --model, and not both", "preset")
    return preset_directory(preset) if preset is not None else Path(str(model))


def serve_config(directory: Path, seed: int, given: dict[str, Any], **defaults: object) -> ServeConfig:
    """Serves token ids on no public port. What was given goes before `defaults`, and those before ServeConfig's."""
    own = {"port": 0, "grpc_port": 0, "skip_tokenizer_init": True, "enable_prefix_caching": False}
    options: dict[str, Any] = {**own, **defaults, **given}
    has_weights = any(directory.glob("*.safetensors"))
    options.setdefault("load_format", "auto" if has_weights else "dummy")
    if "max_model_len" not in options:
        own_limit = ModelConfig.from_directory(directory).max_position_embeddings
        options["max_model_len"] = min(own_limit, _MAX_MODEL_LEN)
    return ServeConfig(model=str(directory), seed=seed, **options)


def describe(config: ServeConfig, **settings: Value) -> dict[str, Value]:
    """What a report says about how it was made; the command has the rest."""
    names = ("model", "tensor_parallel_size", "num_groups", "num_gateways", "device", "dtype", "block_size")
    limits = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "num_inflight_steps", "itl_target_ms")
    memory = ("enable_prefix_caching", "swap_space")
    return {**{name: getattr(config, name) for name in (*names, *limits, *memory, "enforce_eager", "seed")}, **settings}
