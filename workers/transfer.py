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
