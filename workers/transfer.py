"""Host arrays to the device without waiting for it."""

import math
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

_ALIGNMENT = 16  # bytes: kernels are compiled anew for pointers that are not multiples of it


def to_device(array: np.ndarray[Any, Any], device: torch.device) -> torch.Tensor:
    """A device copy of `array`, which must be fresh: on the CPU the tensor shares its memory.

    On CUDA the copy is queued from pinned memory. Torch's host allocator keeps that memory until the copy is done.
    """
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


class Parcel:
    """Arrays that go to a device in one copy, which costs as much time as that of a single small one.

    `add` gives tensors at once. Their content is queued when the parcel is closed: what reads them comes after that.
    """

    def __init__(self, device: torch.device, num_bytes: int) -> None:
        """`num_bytes` that are set aside; arrays that find no room any more go by themselves."""
        self._device = device
        self._num_used = 0
        self._num_bytes = num_bytes = 0 if device.type == "cpu" else num_bytes
        if num_bytes:
            self._host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
            self._here = self._host.numpy()
            self._there = torch.empty(num_bytes, dtype=torch.uint8, device=device)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._num_used:
            self._there[: self._num_used].copy_(self._host[: self._num_used], non_blocking=True)

    def add(self, array: np.ndarray[Any, Any]) -> torch.Tensor:
        """As `to_device`."""
        start = -(-self._num_used // _ALIGNMENT) * _ALIGNMENT
        end = start + array.nbytes
        if not array.nbytes or end > self._num_bytes:
            return to_device(array, self._device)
        self._here[start:end] = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        self._num_used = end
        dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
        return self._there[start:end].view(dtype).view(array.shape)

    @staticmethod
    def size_of(*arrays: np.ndarray[Any, Any]) -> int:
        """Bytes that hold them all."""
        return sum(math.ceil(array.nbytes / _ALIGNMENT) * _ALIGNMENT for array in arrays)
