"""What a process can do before it is a rank: import all that one comes to need. It takes nothing of a GPU."""

import importlib

import torch

_MODULES = {
    "cpu": ("server", "rank", "model_runner"),
    "cuda": ("server", "rank", "model_runner", "decode_graphs", "segment_graphs", "kernel_compile", "symmetric_memory"),
}
_KERNELS = {"cpu": "cpu", "cuda": "triton_ops"}


def import_for(device_type: str) -> None:
    """`device_type` is "cpu" or "cuda"."""
    package = __package__.rpartition(".")[0]
    for module in _MODULES[device_type]:
        importlib.import_module(f"{__package__}.{module}")
    importlib.import_module(f"{package}.kernels.{_KERNELS[device_type]}")
    if device_type == "cpu":
        _run_first_kernel()


def _run_first_kernel() -> None:
    """Numba imports half of itself when its first kernel runs: 0.5 s of a start."""
    from ..kernels.cpu import CpuOperations

    CpuOperations().rms_norm(torch.ones(1, 16), torch.ones(16), 1e-6)
