"""Host arrays to the device without waiting for it."""

from typing import Any

import numpy as np
import torch


def to_device(array: np.ndarray[Any, Any], device: torch.device) -> torch.Tensor:
    """A device copy of `array`, which must be fresh: on the CPU the tensor shares its memory.

    On CUDA the copy is queued from pinned memory. Torch's host allocator keeps that memory until the copy is done.
    """
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def send_both(
    longs: np.ndarray[Any, np.dtype[np.int64]], words: np.ndarray[Any, Any], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `to_device`, of int64 numbers and of numbers of four bytes, in one copy: of small ones each costs as much."""
    if device.type == "cpu":
        return torch.from_numpy(longs), torch.from_numpy(words)
    packed = np.empty(longs.size + -(-words.size // 2), dtype=np.int64)
    packed[: longs.size] = longs.reshape(-1)
    packed[longs.size :].view(words.dtype)[: words.size] = words
    sent = to_device(packed, device)
    dtype = torch.float32 if words.dtype == np.float32 else torch.int32
    return sent[: longs.size].view(longs.shape), sent[longs.size :].view(dtype)[: words.size]
