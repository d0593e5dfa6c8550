"""The device operations that layers call, and the one place that chooses their implementation for a device."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from . import reference
from .batch import AttentionBatch

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class Operations:
    """One implementation of every operation. Formulas and shapes are those of kernels/reference.py."""

    # Of one loaded weight, once: only the same implementation's `linear` knows what is in the result.
    pack_weight: Callable[[Tensor], Tensor]
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    rope_and_cache: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int], Tensor]
    silu_and_mul: Callable[[Tensor], Tensor]
    # What one step's layers share; only the same implementation's `attend` knows what it holds.
    plan_attention: Callable[[AttentionBatch, int, torch.dtype], Any]
    attend: Callable[[Tensor, Tensor, Tensor, Any, float], Tensor]


REFERENCE = Operations(
    pack_weight=reference.pack_weight,
    linear=reference.linear,
    rms_norm=reference.rms_norm,
    add_rms_norm=reference.add_rms_norm,
    rope_and_cache=reference.rope_and_cache,
    silu_and_mul=reference.silu_and_mul,
    plan_attention=reference.plan_attention,
    attend=reference.attend,
)


def operations_for(device: torch.device) -> Operations:
    """The implementation for `device`: Triton kernels on a GPU, the torch reference and oneDNN on a CPU."""
    if device.type != "cuda":
        from .cpu import CPU  # as below, made from REFERENCE

        return CPU
    from .triton_ops import TRITON  # Triton comes with a CUDA build of torch, and is needed with no other

    return TRITON
