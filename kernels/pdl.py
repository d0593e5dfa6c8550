"""Programmatic dependent launch (PDL): a kernel's programs start while the kernel in front of it still ends.

The rule: a kernel launched so calls `wait_for_earlier_kernels` in every program before it reads anything that an
earlier kernel writes and before it writes anything that an earlier kernel may still read. Weights, which no kernel
writes, may be read before. Since every program waits, that the kernel in front has ended means that all before it have.
Kernels launched in the usual way wait for everything by themselves, so both kinds mix.
"""

import functools

import torch
import triton
import triton.language as tl


@functools.cache
def has_pdl(device: torch.device) -> bool:
    """Whether kernels on `device` may be launched with `launch_pdl=True`: from Hopper on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def wait_for_earlier_kernels(pdl: tl.constexpr) -> None:
    """Until they have ended and what they wrote can be seen. The kernel behind may start now: it waits in its turn."""
    if pdl:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
