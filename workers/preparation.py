"""What a process can do before it is a rank: import all that one comes to need. It takes nothing of a GPU."""

import importlib
import sys
from contextlib import suppress

import torch

_MODULES = {
    "cpu": ("server", "rank", "model_runner"),
    "cuda": ("server", "rank", "model_runner", "decode_graphs", "segment_graphs", "kernel_compile", "symmetric_memory"),
}
_KERNELS = {"cpu": "cpu", "cuda": "triton_ops"}
# Triton 3.6 imports it when it first looks at an argument.
_TRITON_LATE = "triton.experimental.gluon.nvidia.hopper"


def import_for(device_type: str) -> None:
    """`device_type` is "cpu" or "cuda"."""
    package = __package__.rpartition(".")[0]
    for module in _MODULES[device_type]:
        importlib.import_module(f"{__package__}.{module}")
    importlib.import_module(f"{package}.kernels.{_KERNELS[device_type]}")
    if device_type == "cpu":
        _run_first_kernel()
    else:
        with suppress(ImportError):  # another release may have no such module, and import none
            importlib.import_module(_TRITON_LATE)
        _find_strides()
        _name_kernels()


def _find_strides() -> None:
    """Torch finds those of a tensor in symmetric memory by what imports sympy: 0.6 to 2.5 s of a start."""
    from torch import _prims_common

    _prims_common.make_contiguous_strides_for((1,))


def _name_kernels() -> None:
    """Triton finds compiled kernels by hashes of their sources and of its own files: 0.5 s of a start."""
    from triton.runtime.cache import triton_key
    from triton.runtime.jit import JITFunction

    triton_key()
    package = f"{__package__.rpartition('.')[0]}.kernels."
    for module in [module for name, module in sys.modules.items() if name.startswith(package)]:
        for kernel in vars(module).values():
            if isinstance(kernel, JITFunction):
                _ = kernel.cache_key


def _run_first_kernel() -> None:
    """Numba imports half of itself when its first kernel runs: 0.5 s of a start."""
    from ..kernels.cpu import CpuOperations

    CpuOperations().rms_norm(torch.ones(1, 16), torch.ones(16), 1e-6)
