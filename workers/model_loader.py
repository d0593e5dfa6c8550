"""From a model directory to one rank's model, ready to run."""

from pathlib import Path

import torch

from ..errors import InvalidArgumentError
from .checkpoint import verify_tensors
from .device_memory import check_weights_fit
from .model_config import ModelConfig
from .models.registry import Model, model_class, registered_architectures
from .parallel import TensorParallel
from .weights import DummyWeights, SafetensorsWeights

LOAD_FORMATS = ("safetensors", "dummy")


def check_model(model_path: str | Path, load_format: str, dtype: torch.dtype, tp: TensorParallel) -> ModelConfig:
    """That `load_model` can load it, so far as can be told without reading weights.

    Raises NotFoundError, CheckpointError, ResourceExhaustedError (they do not fit the device), or InvalidArgumentError
    (load_format).
    """
    if load_format not in LOAD_FORMATS:
        raise InvalidArgumentError(
            f"load_format {load_format!r} is unknown; use one of {', '.join(LOAD_FORMATS)}", field="load_format"
        )
    config = ModelConfig.from_directory(model_path, registered_architectures())
    shapes = model_class(config.architecture).tensor_shapes(config)
    check_weights_fit(shapes.values(), dtype, tp.size, tp.device)
    if load_format == "safetensors":
        verify_tensors(model_path, shapes)
    return config


def make_model(
    model_path: str | Path, load_format: str, dtype: torch.dtype, tp: TensorParallel, max_model_len: int
) -> Model:
    """This rank's model on tp.device, without its weights. Raises as `load_model`."""
    config = check_model(model_path, load_format, dtype, tp)
    return model_class(config.architecture)(config, tp, dtype, max_model_len)


def load_model(
    model_path: str | Path,
    load_format: str,
    dtype: torch.dtype,
    tp: TensorParallel,
    max_model_len: int,
    seed: int,
) -> tuple[Model, ModelConfig]:
    """Makes this rank's shard on tp.device. `seed` is that of "dummy" weights; "safetensors" reads only its slices.

    Raises the errors of `check_model`, and InvalidArgumentError (tensor_parallel_size).
    """
    model = make_model(model_path, load_format, dtype, tp, max_model_len)
    fill_model(model, model_path, load_format, tp.device, seed)
    return model, model.config


def fill_model(model: Model, model_path: str | Path, load_format: str, device: torch.device, seed: int) -> None:
    """Gives a model that `make_model` made its weights. `seed` and errors: as `load_model`."""
    if load_format == "dummy":
        model.load_weights(DummyWeights(model.tensor_shapes(model.config), seed, model.dtype, device))
        return
    with SafetensorsWeights(model_path, device) as weights:
        model.load_weights(weights)
