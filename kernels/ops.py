"""The device operations that layers call, and the one place that chooses their implementation for a device."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import reference
from .batch import AttentionBatch
from .reference import AttentionPlan

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class Operations:
    """One implementation of every operation. Formulas and shapes are those of kernels/reference.py."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    apply_rope: Callable[[Tensor, Tensor, Tensor], Tensor]
    silu_and_mul: Callable[[Tensor], Tensor]
    write_kv: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]
    plan_attention: Callable[[AttentionBatch, int, torch.dtype], AttentionPlan]
    attend: Callable[[Tensor, Tensor, Tensor, AttentionPlan, float], Tensor]


REFERENCE = Operations(
    rms_norm=reference.rms_norm,
    add_rms_norm=reference.add_rms_norm,
    apply_rope=reference.apply_rope,
    silu_and_mul=reference.silu_and_mul,
    write_kv=reference.write_kv,
    plan_attention=reference.plan_attention,
    attend=reference.attend,
)


def operations_for(device: torch.device) -> Operations:
    """The implementation for `device`. The reference serves every device so far."""
    del device
    return REFERENCE
