"""Where layers get their weights from: a safetensors checkpoint, or random numbers of the same shapes.

Both hand out slices along one dimension, so that a rank touches only what it keeps.
"""

import zlib
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError
from .checkpoint import Shapes, TensorHeader, read_headers

# The spread that Llama's own initialisation uses.
_DUMMY_STD = 0.02


@dataclass(frozen=True, slots=True)
class Shard:
    """Indices [start, stop) of dimension `dim`."""

    dim: int
    start: int
    stop: int


class Weights(Protocol):
    """A model's tensors, by their Hugging Face names."""

    def read(self, name: str, shard: Shard | None = None) -> torch.Tensor:
        """The tensor or one shard of it, on the device, in the source's own dtype."""
        ...


class SafetensorsWeights:
    """Reads from a model directory. Use it as a context manager: it holds the files open."""

    def __init__(self, path: str | Path, device: torch.device) -> None:
        self._headers: dict[str, TensorHeader] = read_headers(path)
        self._device = device
        self._files: dict[Path, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()
        self._files.clear()

    def read(self, name: str, shard: Shard | None = None) -> torch.Tensor:
        """As Weights.read. Only the shard's bytes are read. Raises CheckpointError."""
        if name not in self._headers:
            raise CheckpointError(f"the checkpoint has no tensor {name}")
        file = self._headers[name].file
        try:
            tensor: torch.Tensor = self._slice(file, name, shard)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"tensor {name} cannot be read from {file}") from error
        return tensor

    def _slice(self, file: Path, name: str, shard: Shard | None) -> Any:  # noqa: ANN401 (safetensors is untyped)
        if file not in self._files:
            self._files[file] = self._stack.enter_context(safe_open(file, framework="pt", device=str(self._device)))
        if shard is None:
            return self._files[file].get_tensor(name)
        rows = slice(shard.start, shard.stop)
        view = self._files[file].get_slice(name)
        return view[rows] if shard.dim == 0 else view[:, rows]


class DummyWeights:
    """Seeded random weights, made on the device. Every rank draws the whole tensor and keeps its shard, so the model is
    the same at any tensor parallel size (on one kind of device: CPU and CUDA generators differ)."""

    def __init__(self, shapes: Shapes, seed: int, dtype: torch.dtype, device: torch.device) -> None:
        self._shapes, self._seed, self._dtype, self._device = shapes, seed, dtype, device

    def read(self, name: str, shard: Shard | None = None) -> torch.Tensor:
        """As Weights.read. Norm weights are 1, biases 0, all else normal."""
        tensor = self._full_tensor(name)
        return tensor if shard is None else tensor.narrow(shard.dim, shard.start, shard.stop - shard.start)

    def _full_tensor(self, name: str) -> torch.Tensor:
        shape = self._shapes[name]
        if len(shape) == 1:
            make: Callable[..., torch.Tensor] = torch.zeros if name.endswith(".bias") else torch.ones
            return make(shape, dtype=self._dtype, device=self._device)
        generator = torch.Generator(self._device)
        # One hash of both: torch's CPU generator takes in no more than 32 bits.
        generator.manual_seed(zlib.crc32(f"{self._seed}/{name}".encode()))
        tensor = torch.empty(shape, dtype=self._dtype, device=self._device)
        return tensor.normal_(std=_DUMMY_STD, generator=generator)
