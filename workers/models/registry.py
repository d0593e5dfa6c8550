"""Which class runs which architecture: the place where new models are added, from here or from outside."""

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch

from ...errors import CheckpointError, InvalidArgumentError
from ...kernels.batch import AttentionBatch
from ...kernels.ops import Operations
from ..kv_cache import KVCache
from ..layers import Parameter
from ..model_config import ModelConfig
from ..parallel import TensorParallel
from ..segments import SegmentRunner, run_now
from ..weights import Weights
from .llama import LlamaForCausalLM


class Model(Protocol):
    """One rank of a decoder-only model. LlamaForCausalLM says what each member means."""

    config: ModelConfig
    dtype: torch.dtype
    ops: Operations

    def __init__(self, config: ModelConfig, tp: TensorParallel, dtype: torch.dtype, max_model_len: int) -> None: ...

    @staticmethod
    def tensor_shapes(config: ModelConfig) -> Mapping[str, tuple[int, ...]]:
        """The tensors of its checkpoints, by name."""
        ...

    @property
    def num_kv_heads(self) -> int: ...

    @property
    def vocab_start(self) -> int: ...

    @property
    def local_vocab_size(self) -> int: ...

    def load_weights(self, weights: Weights) -> None: ...

    def parameters(self) -> Iterator[Parameter]: ...

    def forward(
        self, token_ids: torch.Tensor, batch: AttentionBatch, kv_cache: KVCache, run: SegmentRunner = run_now
    ) -> torch.Tensor: ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor: ...


_MODELS: dict[str, type[Model]] = {"LlamaForCausalLM": LlamaForCausalLM}


def register_model(architecture: str, cls: type[Model]) -> None:
    """Serves checkpoints whose config.json names `architecture` with `cls`, in this process.

    Raises InvalidArgumentError when another class has the name.
    """
    if _MODELS.setdefault(architecture, cls) is not cls:
        raise InvalidArgumentError(
            f"architecture {architecture} is registered already, as {_MODELS[architecture].__name__}"
        )


def registered_architectures() -> tuple[str, ...]:
    """All names, in order of registration."""
    return tuple(_MODELS)


def model_class(architecture: str) -> type[Model]:
    """The class for an architecture. Raises CheckpointError naming those that are served."""
    if architecture not in _MODELS:
        raise CheckpointError(f"architecture {architecture} is not served; served: {', '.join(_MODELS)}")
    return _MODELS[architecture]
