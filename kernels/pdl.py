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


# Rows of a step from which on a program that starts early takes room from those that still work: measured on an H200,
# a chain of norms gains at 32 rows and loses at 256.
_MAX_EARLY_ROWS = 64


def starts_early(device: torch.device, num_rows: int) -> bool:
    """Whether a kernel over `num_rows` tokens is to be launched so."""
    return num_rows <= _MAX_EARLY_ROWS and has_pdl(device)


@triton.jit
def let_next_kernel_start(pdl: tl.constexpr) -> None:
    """Its programs take what room is left, and wait in their turn."""
    if pdl:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_earlier_kernels(pdl: tl.constexpr, let_next_start: tl.constexpr = True) -> None:
    """Until they have ended and what they wrote can be seen. The next kernel may start now, unless that is put off."""
    if pdl:
        if let_next_start:
            tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
